// What both kinds of absorbed attention share: the queries' rows, and the softmax that runs along the cache.
#pragma once

#include <algorithm>

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

constexpr int64_t CHUNK = 256;    // positions of a piece of work, which is that and some passes of rows
constexpr int64_t TOGETHER = 4;   // passes of a piece at most: they share what is made of its positions
constexpr int64_t PIECES = 256;   // a pass over a chunk each: so many sums are kept before they are joined
constexpr int64_t SPREAD = 32;    // pieces that keep threads busy
static_assert(CHUNK % CACHE_BLOCK == 0, "a chunk begins with a page");

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

// Softmax of some rows over a chunk, whose unnormalised result lies elsewhere.
template <int ROWS>
struct Part {
    float maximum[ROWS], total[ROWS];
};

// Scores to exponentials below their maximum, zero from limits[row] on. Lanes are rows.
template <int ROWS>
void soften(float (*scores)[ROWS], int64_t n, const int32_t* limits, Part<ROWS>& part) {
    for (int at = 0; at < ROWS; at += LANES) {
        Int limit;
        std::memcpy(&limit, limits + at, sizeof limit);
        Vec largest = splat(-INFINITY), total{};
        for (int64_t s = 0; s < n; s++) {
            const Vec seen = splat_int(int32_t(s)) < limit ? load(scores[s] + at) : splat(-INFINITY);
            store(scores[s] + at, seen);
            largest = maximum(largest, seen);
        }
        const Vec base = largest > -INFINITY ? largest : Vec{};  // a row that sees none of these
        for (int64_t s = 0; s < n; s++) {
            const Vec p = exponential(load(scores[s] + at) - base);
            store(scores[s] + at, p);
            total += p;
        }
        store(part.maximum + at, largest);
        store(part.total + at, total);
    }
}

// How many of positions [s, s + n) each row of a pass sees.
template <int ROWS>
void find_limits(const Shape& shape, int64_t pass, int64_t s, int64_t n, int32_t (&limits)[ROWS]) {
    for (int r = 0; r < ROWS; r++) limits[r] = int32_t(std::clamp<int64_t>(shape.seen_by(pass * ROWS + r) - s, 0, n));
}

// mixed [T · H, C] = softmax-weighted latents. step(pass, end, s, n, out, parts) is to make the sums of positions [s, s + n),
// at most CHUNK, for the rows [pass * ROWS, end * ROWS): in out [rows, width], which is zero, and parts [passes].
//
// A row's chunks are joined one by one in their order, so that its result is the same whatever rows and threads there are.
template <int ROWS, class Step>
void absorbed(const Shape& shape, int64_t width, float* mixed, const Step& step) {
    const int64_t rows = shape.rows(), passes = (rows + ROWS - 1) / ROWS, C = shape.C;
    if (rows == 0) return;
    const int64_t chunks = (shape.S + CHUNK - 1) / CHUNK, round = std::clamp<int64_t>(PIECES / passes, 1, chunks);
    const int64_t together = std::clamp<int64_t>(passes * round / SPREAD, 1, TOGETHER);
    const int64_t groups = (passes + together - 1) / together;
    thread_local Scratch part_scratch, sum_scratch, joint_scratch;
    float* sums = sum_scratch.reserve<float>(round * passes * ROWS * width);
    Part<ROWS>* parts = part_scratch.reserve<Part<ROWS>>(round * passes);
    float *largest = joint_scratch.reserve<float>(2 * rows), *total = largest + rows;
    std::fill(largest, total, -INFINITY);
    std::fill(total, total + rows, 0.0f);
    std::memset(mixed, 0, rows * C * sizeof(float));

    for (int64_t first = 0; first < chunks; first += round) {
        const int64_t count = std::min(round, chunks - first);
        parallel(groups * count, [&](int64_t item) {
            // Neighbours share a part of the cache, so that it comes from memory once.
            const int64_t pass = item % groups * together, end = std::min(pass + together, passes);
            const int64_t at = item / groups * passes + pass, s = (first + item / groups) * CHUNK;
            float* out = sums + at * ROWS * width;
            const int64_t n = std::min(CHUNK, shape.seen_by(end * ROWS - 1) - s);
            std::memset(out, 0, (end - pass) * ROWS * width * sizeof(float));
            for (int64_t p = at; p < at + end - pass; p++) std::fill_n(parts[p].maximum, ROWS, -INFINITY);
            if (n > 0) step(pass, end, s, n, out, parts + at);
        }, Claim::WHOLE);
        parallel(rows, [&](int64_t row) {
            float* to = mixed + row * C;
            for (int64_t at = row / ROWS; at < count * passes; at += passes) {
                const float part = parts[at].maximum[row % ROWS], joint = std::max(largest[row], part);
                if (part == -INFINITY) continue;  // sees none of these
                const float keep = std::exp(largest[row] - joint), add = std::exp(part - joint);
                const float* from = sums + (at * ROWS + row % ROWS) * width;
                for (int64_t c = 0; c < C; c++) to[c] = to[c] * keep + from[c] * add;
                total[row] = total[row] * keep + parts[at].total[row % ROWS] * add;
                largest[row] = joint;
            }
            if (first + count == chunks)
                for (int64_t c = 0; c < C; c++) to[c] /= total[row];
        });
    }
}

// From the queries in the latent space [T · H, C], not yet scaled, and rope [T · H, P], rotated and scaled. `mixed` may be
// `latent`.
void absorbed_bf16(const Shape& shape, const float* latent, const float* rope, float scale, const Latents& latents,
                   float* mixed);
void absorbed_int8(const Shape& shape, const float* latent, const float* rope, float scale, const Latents& latents,
                   float* mixed);

}  // namespace dsv2
