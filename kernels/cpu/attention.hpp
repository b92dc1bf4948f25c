// What absorbed attention over bf16 and over 8-bit latents has in common: shapes, query rows, and the split of the work
// into pieces with a running softmax (as in flash decoding).
#pragma once

#include <algorithm>

#include "latents.hpp"
#include "matrix.hpp"
#include "pool.hpp"

namespace dsv2 {

// Shapes: T queries at the last T of S positions; H heads; per head N and P numbers of a query without and with
// rotation, and V of a value; C numbers of a latent.
struct Shape {
    int64_t T, S, H, N, P, C, V;
    int64_t width() const { return C + P; }
    int64_t rows() const { return T * H; }  // query rows, one per token and head
    int64_t visible(int64_t t) const { return S - T + t + 1; }  // positions that query t attends to
    int64_t visible_to_row(int64_t row) const { return visible(std::min(row, rows() - 1) / H); }
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A piece of work is one chunk of positions times up to TOGETHER passes; a pass is ROWS query rows.
constexpr int64_t CHUNK = 256;    // positions per piece
constexpr int64_t TOGETHER = 4;   // passes per piece at most: they share the unpacked positions
constexpr int64_t PIECES = 256;   // partial results (a pass over a chunk) that are stored before they are merged
constexpr int64_t SPREAD = 32;    // pieces that suffice to keep all threads busy
static_assert(CHUNK % CACHE_BLOCK == 0, "a chunk begins at the start of a block");

// Query: the type of a stored query number. STEP: numbers of a query row that one instruction multiplies with as many
// of a latent.
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

// Maximum and sum of the softmax of ROWS rows over one chunk; the unnormalised result is stored elsewhere.
template <int ROWS>
struct Part {
    float maximum[ROWS], total[ROWS];
};

// Replace each row's scores by exp(score - maximum), and by 0 from position limits[row] on. Lanes are rows.
template <int ROWS>
void softmax_chunk(float (*scores)[ROWS], int64_t n, const int32_t* limits, Part<ROWS>& part) {
    for (int at = 0; at < ROWS; at += LANES) {
        Int limit;
        std::memcpy(&limit, limits + at, sizeof limit);
        Vec largest = splat(-INFINITY), total{};
        for (int64_t s = 0; s < n; s++) {
            const Vec masked = splat_int(int32_t(s)) < limit ? load(scores[s] + at) : splat(-INFINITY);
            store(scores[s] + at, masked);
            largest = maximum(largest, masked);
        }
        const Vec base = largest > -INFINITY ? largest : Vec{};  // 0 for a row that attends to none of these positions
        for (int64_t s = 0; s < n; s++) {
            const Vec p = exponential(load(scores[s] + at) - base);
            store(scores[s] + at, p);
            total += p;
        }
        store(part.maximum + at, largest);
        store(part.total + at, total);
    }
}

// How many of positions [s, s + n) each row of a pass attends to.
template <int ROWS>
void find_limits(const Shape& shape, int64_t pass, int64_t s, int64_t n, int32_t (&limits)[ROWS]) {
    for (int r = 0; r < ROWS; r++)
        limits[r] = int32_t(std::clamp<int64_t>(shape.visible_to_row(pass * ROWS + r) - s, 0, n));
}

// mixed [T · H, C] = softmax-weighted sum of the latents. step(pass, end, s, n, out, parts) computes the unnormalised
// sums over positions [s, s + n), at most CHUNK, for rows [pass * ROWS, end * ROWS): it adds to out [rows, width],
// which is zero before, and fills parts [passes].
//
// The chunks of a row are merged one by one in order, so that its result does not depend on the other rows or on the
// number of threads.
template <int ROWS, class Step>
void absorbed(const Shape& shape, int64_t width, float* mixed, const Step& step) {
    const int64_t rows = shape.rows(), passes = (rows + ROWS - 1) / ROWS, C = shape.C;
    if (rows == 0) return;
    const int64_t chunks = (shape.S + CHUNK - 1) / CHUNK, round = std::clamp<int64_t>(PIECES / passes, 1, chunks);
    const int64_t together = std::clamp<int64_t>(passes * round / SPREAD, 1, TOGETHER);
    const int64_t groups = (passes + together - 1) / together;
    thread_local Scratch part_scratch, sum_scratch, merged_scratch;
    float* sums = sum_scratch.reserve<float>(round * passes * ROWS * width);
    Part<ROWS>* parts = part_scratch.reserve<Part<ROWS>>(round * passes);
    float *largest = merged_scratch.reserve<float>(2 * rows), *total = largest + rows;
    std::fill(largest, total, -INFINITY);
    std::fill(total, total + rows, 0.0f);
    std::memset(mixed, 0, rows * C * sizeof(float));

    for (int64_t first = 0; first < chunks; first += round) {
        const int64_t count = std::min(round, chunks - first);
        parallel(groups * count, [&](int64_t item) {
            // Consecutive items use the same positions, so that these are read from memory once.
            const int64_t pass = item % groups * together, end = std::min(pass + together, passes);
            const int64_t at = item / groups * passes + pass, s = (first + item / groups) * CHUNK;
            float* out = sums + at * ROWS * width;
            const int64_t n = std::min(CHUNK, shape.visible_to_row(end * ROWS - 1) - s);
            std::memset(out, 0, (end - pass) * ROWS * width * sizeof(float));
            for (int64_t p = at; p < at + end - pass; p++) std::fill_n(parts[p].maximum, ROWS, -INFINITY);
            if (n > 0) step(pass, end, s, n, out, parts + at);
        }, Claim::WHOLE);
        parallel(rows, [&](int64_t row) {
            float* to = mixed + row * C;
            for (int64_t at = row / ROWS; at < count * passes; at += passes) {
                const float part = parts[at].maximum[row % ROWS], merged = std::max(largest[row], part);
                if (part == -INFINITY) continue;  // the row attends to none of these positions
                const float keep = std::exp(largest[row] - merged), add = std::exp(part - merged);
                const float* from = sums + (at * ROWS + row % ROWS) * width;
                for (int64_t c = 0; c < C; c++) to[c] = to[c] * keep + from[c] * add;
                total[row] = total[row] * keep + parts[at].total[row % ROWS] * add;
                largest[row] = merged;
            }
            if (first + count == chunks)
                for (int64_t c = 0; c < C; c++) to[c] /= total[row];
        });
    }
}

// mixed [T · H, C] from the queries in latent space, `latent` [T · H, C], not yet scaled, and their rope parts [T · H,
// P], rotated and scaled. `mixed` may be the same memory as `latent`.
void absorbed_bf16(const Shape& shape, const float* latent, const float* rope, float scale, const Latents& latents,
                   float* mixed);
void absorbed_int8(const Shape& shape, const float* latent, const float* rope, float scale, const Latents& latents,
                   float* mixed);

}  // namespace dsv2
