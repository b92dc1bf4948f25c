// What both kinds of absorbed attention share: the queries' rows, and the softmax that runs along the cache.
#pragma once

#include "latents.hpp"
#include "matrix.hpp"
#include "pool.hpp"

namespace dsv2 {

// Shapes: T queries, the last of S positions; H heads; N, P numbers of a query with and without rotation; C latent; V.
struct Shape {
    int64_t T, S, H, N, P, C, V;
    int64_t width() const { return C + P; }
    int64_t rows() const { return T * H; }  // of queries: a token's head each
    int64_t visible(int64_t t) const { return S - T + t + 1; }  // positions that query t may see
    int64_t seen_by(int64_t row) const { return visible(std::min(row, rows() - 1) / H); }
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

constexpr int64_t CHUNK = 256;       // positions of a pass: with some rows, a piece of work
static_assert(CHUNK % PAGE == 0, "a pass begins with a page");
constexpr int64_t SPLIT_BELOW = 32;  // fewer passes than this are split along the positions too

// What a query row is kept as, and how many numbers of it meet as many of a latent in one instruction.
#if DSV2_BF16
typedef uint16_t Query;
constexpr int STEP = 2 * LANES;
typedef __m512bh Packed;
inline Query to_query(float x) { return to_bf16(x); }
inline Packed load_query(const Query* p) { return (Packed)_mm512_loadu_si512(p); }
inline Vec dot_add(Vec sum, Packed a, Packed b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
typedef float Query;
constexpr int STEP = LANES;
typedef Vec Packed;
inline Query to_query(float x) { return x; }
inline Packed load_query(const Query* p) { return load(p); }
inline Vec dot_add(Vec sum, Packed a, Packed b) { return fma(a, b, sum); }
#endif

// Running softmax of some rows, whose unnormalised result lies elsewhere.
template <int ROWS>
struct Running {
    float maximum[ROWS], total[ROWS];
};

// mixed [T · H, C] = softmax-weighted latents. step(pass, s, n, out, state) adds positions [s, s + n), at most CHUNK, to the
// rows [pass * ROWS, …) in out [ROWS, width] and in their state.
template <int ROWS, class Step>
void absorbed(const Shape& shape, int64_t width, float* mixed, const Step& step) {
    const int64_t rows = shape.rows(), passes = (rows + ROWS - 1) / ROWS, C = shape.C;
    const int64_t chunks = (shape.S + CHUNK - 1) / CHUNK;
    const int64_t parts = passes < SPLIT_BELOW ? chunks : 1;
    thread_local Scratch partial_scratch, sum_scratch;
    float* sums = sum_scratch.reserve<float>(passes * parts * ROWS * width);
    Running<ROWS>* partials = partial_scratch.reserve<Running<ROWS>>(passes * parts);

    parallel(passes * parts, [&](int64_t item) {
        // Neighbours share a part of the cache, so that it comes from memory once.
        const int64_t pass = item % passes, part = item / passes;
        float* out = sums + item * ROWS * width;
        Running<ROWS>& state = partials[item];
        std::memset(out, 0, ROWS * width * sizeof(float));
        for (int r = 0; r < ROWS; r++) state.maximum[r] = -INFINITY, state.total[r] = 0;
        const int64_t see = shape.seen_by(pass * ROWS + ROWS - 1);
        const int64_t from = parts > 1 ? part * CHUNK : 0, to = parts > 1 ? std::min(from + CHUNK, see) : see;
        for (int64_t s = from; s < to; s += CHUNK) step(pass, s, std::min(CHUNK, to - s), out, state);
    }, Claim::WHOLE);

    parallel(passes, [&](int64_t pass) {  // join the parts, in their order
        for (int r = 0; r < ROWS && pass * ROWS + r < rows; r++) {
            float largest = -INFINITY, total = 0;
            for (int64_t k = 0; k < parts; k++) largest = std::max(largest, partials[k * passes + pass].maximum[r]);
            float* to = mixed + (pass * ROWS + r) * C;
            std::memset(to, 0, C * sizeof(float));
            for (int64_t k = 0; k < parts; k++) {
                const Running<ROWS>& part = partials[k * passes + pass];
                const float weight = std::exp(part.maximum[r] - largest);
                const float* from = sums + ((k * passes + pass) * ROWS + r) * width;
                if (weight > 0) for (int64_t c = 0; c < C; c++) to[c] += weight * from[c];
                total += weight * part.total[r];
            }
            for (int64_t c = 0; c < C; c++) to[c] /= total;
        }
    });
}

// The same over 8-bit rows, from the queries in the latent space [T · H, C], not yet scaled, and rope [T · H, P], rotated
// and scaled. `mixed` may be `latent`.
void absorbed_int8(const Shape& shape, const float* latent, const float* rope, float scale, const Latents& latents,
                   float* mixed);

}  // namespace dsv2
