// Latent attention over a cache of bf16 or 8-bit rows, in both of its forms.
//
// Absorbed (few queries): scores and sums in the latent space, the cache read once for several heads; here over bf16 rows,
// in `attention_int8.cpp` over 8-bit ones.
// Materialised (many queries): keys and values of one head are rebuilt block by block, and the softmax runs along.
#include "attention.hpp"

#include "api.hpp"
#include "rows.hpp"

namespace dsv2 {
namespace {

// ---- absorbed, bf16 -------------------------------------------------------------------------------------------------

constexpr int ROWS = 8;  // rows of queries (a token's head each) that share a pass over the cache

// The bf16 rows of a pass.
struct Positions {
    const uint16_t* pages[CHUNK / PAGE];
    int64_t width;

    Positions(const Latents& latents, int64_t from, int64_t n) : width(latents.C + latents.P) {
        for (int64_t s = 0; s < n; s += PAGE) pages[s / PAGE] = reinterpret_cast<const uint16_t*>(latents.row(from + s));
    }
    const uint16_t* row(int64_t s) const { return pages[s / PAGE] + s % PAGE * width; }
};

inline Packed load_latent(const uint16_t* p) {
#if DSV2_BF16
    return (Packed)_mm512_loadu_si512(p);
#else
    return load_bf16(p);
#endif
}

constexpr int64_t AHEAD_ROWS = 8;  // positions that are fetched ahead of their scores
constexpr int TILE = DSV2_AVX512 ? 2 : 1;  // positions, and registers of columns, that ROWS rows meet at a time

// Where number d of query row `row` is kept: what ROWS rows need in one step lies together. A row is `padded` long.
inline int64_t query_place(int64_t row, int64_t d, int64_t padded) {
    return (row / ROWS * padded + d / STEP * STEP) * ROWS + row % ROWS * STEP + d % STEP;
}

// scores[r][s] = queries[r] · latents[s] for s in [0, n); queries as `query_place` has them, zeros past a row's width.
void score(const Query* queries, const Positions& latents, int64_t n, float (*scores)[CHUNK]) {
    const int64_t width = latents.width, whole = width / STEP * STEP;
    for (int64_t s = 0; s < n; s += TILE) {
        const uint16_t *rows[TILE], *ahead[TILE];
        for (int k = 0; k < TILE; k++) {
            rows[k] = latents.row(std::min(s + k, n - 1));
            ahead[k] = latents.row(std::min(s + k + AHEAD_ROWS, n - 1));
        }
        Vec sums[TILE][ROWS] = {};
        const auto meet = [&](int64_t d, const Packed (&keys)[TILE]) {
            for (int r = 0; r < ROWS; r++) {
                const Packed query = load_query(queries + d * ROWS + r * STEP);
                for (int k = 0; k < TILE; k++) sums[k][r] = dot_add(sums[k][r], query, keys[k]);
            }
        };
        Packed keys[TILE];
        for (int64_t d = 0; d < whole; d += STEP) {
            for (int k = 0; k < TILE; k++) {
                __builtin_prefetch(ahead[k] + d, 0, 2);
                keys[k] = load_latent(rows[k] + d);
            }
            meet(d, keys);
        }
        if (whole < width) {  // the last numbers, from a copy that is as long as a register
            for (int k = 0; k < TILE; k++) {
                uint16_t tail[STEP] = {};
                std::memcpy(tail, rows[k] + whole, (width - whole) * sizeof *tail);
                keys[k] = load_latent(tail);
            }
            meet(whole, keys);
        }
        for (int k = 0; k < TILE; k++)
            for (int r = 0; r < ROWS; r += 4) {
                float four[4];
                sum_four({sums[k][r], sums[k][r + 1], sums[k][r + 2], sums[k][r + 3]}, four);
                for (int i = 0; i < 4 && s + k < n; i++) scores[r + i][s + k] = four[i];
            }
    }
}

// What a position's weights are kept as for `mix_columns`, and how many positions meet in one instruction.
#if DSV2_BF16
constexpr int TOGETHER = 2;
inline void pack_weights(const float* weights, uint32_t* packed) {
    for (int64_t s = 0; s < CHUNK; s += LANES) {
        const __m256bh halves = _mm512_cvtneps_pbh((__m512)load(weights + s));
        std::memcpy(packed + s / 2, &halves, sizeof halves);
    }
}
#else
constexpr int TOGETHER = 1;
inline void pack_weights(const float* weights, uint32_t* packed) { std::memcpy(packed, weights, CHUNK * sizeof *packed); }
#endif

// out[r][c] += Σ_s weights[r][s] · latents[s][first + c] for TILE registers of columns and n positions. Weights from n on
// are 0, so that a last row without a partner meets itself.
inline void mix_columns(const uint32_t (*packed)[CHUNK], const Positions& latents, int64_t first, int64_t n, float* out,
                        int64_t C) {
    Vec sums[ROWS][TILE] = {};
    for (int64_t page = 0; page < n; page += PAGE) {
        const uint16_t* row = latents.row(page) + first;
        const int64_t end = std::min(page + PAGE, n);
        for (int64_t s = page; s < end; s += TOGETHER, row += TOGETHER * latents.width) {
#if DSV2_BF16
            // The numbers of two positions are interleaved, which permutes the lanes until the end.
            const uint16_t* next = s + 1 < end ? row + latents.width : row;
            const __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(next);
            const __m512bh columns[TILE] = {(__m512bh)_mm512_unpacklo_epi16(a, b), (__m512bh)_mm512_unpackhi_epi16(a, b)};
            for (int r = 0; r < ROWS; r++) {
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(int32_t(packed[r][s / 2]));
                for (int v = 0; v < TILE; v++) sums[r][v] = dot_add(sums[r][v], weight, columns[v]);
            }
#else
            Vec columns[TILE];
            for (int v = 0; v < TILE; v++) columns[v] = load_bf16(row + v * LANES);
            for (int r = 0; r < ROWS; r++) {
                float weight;
                std::memcpy(&weight, &packed[r][s], 4);
                for (int v = 0; v < TILE; v++) sums[r][v] = fma(splat(weight), columns[v], sums[r][v]);
            }
#endif
        }
    }
    for (int r = 0; r < ROWS; r++) {
#if DSV2_BF16
        in_order(sums[r]);
#endif
        for (int v = 0; v < TILE; v++) {
            float* to = out + r * C + v * LANES;
            store(to, load(to) + sums[r][v]);
        }
    }
}

void mix(const float (*weights)[CHUNK], const Positions& latents, int64_t n, float* out, int64_t C) {
    alignas(64) uint32_t packed[ROWS][CHUNK];
    for (int r = 0; r < ROWS; r++) pack_weights(weights[r], packed[r]);
    int64_t c = 0;
    for (; c + TILE * LANES <= C; c += TILE * LANES) mix_columns(packed, latents, c, n, out + c, C);
    for (; c < C; c++)
        for (int r = 0; r < ROWS; r++)
            for (int64_t s = 0; s < n; s++) out[r * C + c] += weights[r][s] * from_bf16(latents.row(s)[c]);
}

// Scores to exponentials below their maximum, zero from `limit` on; returns maximum and sum.
void soften(float* scores, int64_t limit, float& maximum_score, float& total) {
    limit = std::max<int64_t>(limit, 0);
    for (int64_t s = limit; s < CHUNK; s++) scores[s] = -INFINITY;
    Vec largest = splat(-INFINITY), sums{};
    for (int64_t s = 0; s < CHUNK; s += LANES) largest = maximum(largest, load(scores + s));
    maximum_score = max_lane(largest);
    const float base = limit ? maximum_score : 0.0f;
    for (int64_t s = 0; s < CHUNK; s += LANES) {
        const Vec p = exponential(load(scores + s) - base);
        store(scores + s, p);
        sums += p;
    }
    total = sum(sums);
}

void absorbed_bf16(const Shape& shape, const Query* queries, int64_t padded, const Latents& latents, float* mixed) {
    absorbed<ROWS>(shape, shape.C, mixed, [&](int64_t pass, int64_t s, int64_t n, float* out, Running<ROWS>& state) {
        alignas(64) float weights[ROWS][CHUNK];
        const Positions positions(latents, s, n);
        score(queries + pass * ROWS * padded, positions, n, weights);
        for (int r = 0; r < ROWS; r++) {
            float largest, total;
            soften(weights[r], std::min(n, shape.seen_by(pass * ROWS + r) - s), largest, total);
            if (largest == -INFINITY) continue;
            const float joint = std::max(largest, state.maximum[r]);
            const float keep = std::exp(state.maximum[r] - joint), add = std::exp(largest - joint);
            state.total[r] = state.total[r] * keep + total * add;
            state.maximum[r] = joint;
            if (keep != 1) for (int64_t c = 0; c < shape.C; c++) out[r * shape.C + c] *= keep;
            if (add != 1) for (int64_t k = 0; k < CHUNK; k++) weights[r][k] *= add;
        }
        mix(weights, positions, n, out, shape.C);
    });
}

// ---- materialised ---------------------------------------------------------------------------------------------------

#if DSV2_AVX512
constexpr int GEMM_ROWS = 12;
#else
constexpr int GEMM_ROWS = 6;
#endif

template <int M, int VECS>
inline void gemm_tile(const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t K,
                      bool add) {
    Vec sums[M][VECS];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECS; v++) sums[m][v] = add ? load(c + m * ldc + v * LANES) : Vec{};
    for (int64_t k = 0; k < K; k++) {
        Vec right[VECS];
        for (int v = 0; v < VECS; v++) right[v] = load(b + k * ldb + v * LANES);
        for (int m = 0; m < M; m++) {
            const Vec left = splat(a[m * am + k * ak]);
            for (int v = 0; v < VECS; v++) sums[m][v] = fma(left, right[v], sums[m][v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECS; v++) store(c + m * ldc + v * LANES, sums[m][v]);
}

template <int M, int VECS>
inline void gemm_rows(int64_t rows, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c, int64_t ldc,
                      int64_t K, bool add) {
    if constexpr (M > 0) {
        for (; rows >= M; rows -= M, a += M * am, c += M * ldc) gemm_tile<M, VECS>(a, am, ak, b, ldb, c, ldc, K, add);
        gemm_rows<M / 2, VECS>(rows, a, am, ak, b, ldb, c, ldc, K, add);
    }
}

// c[m][n] = (or +=) Σ_k a[m * am + k * ak] · b[k][n]; n in whole registers.
void gemm(int64_t M, int64_t columns, int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool add) {
    int64_t n = 0;
    for (; n + 2 * LANES <= columns; n += 2 * LANES) gemm_rows<GEMM_ROWS, 2>(M, a, am, ak, b + n, ldb, c + n, ldc, K, add);
    for (; n < columns; n += LANES) gemm_rows<GEMM_ROWS, 1>(M, a, am, ak, b + n, ldb, c + n, ldc, K, add);
}

constexpr int64_t KEYS = 128, QUERIES = 64;  // positions and queries of a block of scores

// One head of nope [T, H, N] and rope [T, H, P] (the latter rotated and scaled) into out [T, H, V]. Lanes are queries.
void materialised_head(const Shape& s, int64_t head, const float* nope, const float* rope, const Latents& latents,
                       const Matrix& w_uk, const Matrix& w_uv, float scale, float* out) {
    const int64_t N = round_up(s.N, LANES), V = round_up(s.V, LANES), T = round_up(s.T, LANES), K = N + s.P;
    const int64_t sizes[] = {s.C * N, s.C * V, (s.N + s.P) * T, V * T, 2 * T, KEYS * s.C, KEYS * K, KEYS * V, KEYS * QUERIES};
    int64_t all = 0;
    for (int64_t size : sizes) all += round_up(size, 16);
    thread_local Scratch scratch;
    float *next = scratch.reserve<float>(all), *parts[9];
    for (int i = 0; i < 9; i++) parts[i] = next, next += round_up(sizes[i], 16);
    float *uk = parts[0], *uv = parts[1], *query = parts[2], *sums = parts[3], *largest = parts[4], *total = largest + T;
    float *latent = parts[5], *key = parts[6], *value = parts[7], *scores = parts[8];

    std::memset(uk, 0, (sums - uk) * sizeof(float));
    for (int64_t c = 0; c < s.C; c++) w_uk.dequantize_row(head * s.C + c, uk + c * N, 1);
    for (int64_t v = 0; v < s.V; v++) w_uv.dequantize_row(head * s.V + v, uv + v, V);
    for (int64_t t = 0; t < s.T; t++) {
        const int64_t row = t * s.H + head;
        for (int64_t d = 0; d < s.N; d++) query[d * T + t] = nope[row * s.N + d] * scale;
        for (int64_t d = 0; d < s.P; d++) query[(s.N + d) * T + t] = rope[row * s.P + d];
    }
    std::memset(sums, 0, V * T * sizeof(float));
    for (int64_t t = 0; t < T; t++) largest[t] = -INFINITY, total[t] = 0;

    for (int64_t from = 0; from < s.S; from += KEYS) {
        const int64_t n = std::min(KEYS, s.S - from);
        for (int64_t k = 0; k < n; k++) latents.latent(from + k, latent + k * s.C);
        gemm(n, N, s.C, latent, s.C, 1, uk, N, key, K, false);
        gemm(n, V, s.C, latent, s.C, 1, uv, V, value, V, false);
        for (int64_t k = 0; k < n; k++) latents.rope(from + k, key + k * K + s.N);
        for (int64_t t0 = 0; t0 < T; t0 += QUERIES) {
            const int64_t columns = std::min(QUERIES, T - t0), last = std::min(t0 + columns, s.T) - 1;
            if (from >= s.visible(last)) continue;
            gemm(n, columns, s.N + s.P, key, K, 1, query + t0, T, scores, QUERIES, false);
            for (int64_t t = t0; t < std::min(t0 + columns, s.T); t++)
                for (int64_t k = std::max<int64_t>(0, s.visible(t) - from); k < n; k++)
                    scores[k * QUERIES + t - t0] = -INFINITY;
            for (int64_t i = 0; i < columns; i += LANES) {
                Vec top = load(largest + t0 + i), sum_{};
                const Vec old = top;
                for (int64_t k = 0; k < n; k++) top = maximum(top, load(scores + k * QUERIES + i));
                const Vec base = top > -INFINITY ? top : Vec{};  // a query that sees none of these
                for (int64_t k = 0; k < n; k++) {
                    const Vec p = exponential(load(scores + k * QUERIES + i) - base);
                    store(scores + k * QUERIES + i, p);
                    sum_ += p;
                }
                const Vec keep = exponential(old - base);
                store(total + t0 + i, load(total + t0 + i) * keep + sum_);
                store(largest + t0 + i, top);
                for (int64_t v = 0; v < s.V; v++) store(sums + v * T + t0 + i, load(sums + v * T + t0 + i) * keep);
            }
            gemm(s.V, columns, n, value, 1, V, scores, QUERIES, sums + t0, T, true);
        }
    }
    for (int64_t t = 0; t < s.T; t++)
        for (int64_t v = 0; v < s.V; v++) out[(t * s.H + head) * s.V + v] = sums[v * T + t] / total[t];
}

}  // namespace
}  // namespace dsv2

using namespace dsv2;

API void dsv2_attention(const float* q, const float* rotation, const void* cache, int32_t kept, const int64_t* sequence,
                        const Matrix* w_uk, const Matrix* w_uv, float scale, int64_t T, int64_t H, int64_t P, int32_t absorb,
                        float* out) {
    const Latents latents{static_cast<const uint8_t*>(cache), Kept(kept), w_uv->cols, P, sequence + 1};
    const Shape shape{T, *sequence + T, H, w_uk->cols, P, w_uv->cols, w_uv->rows / H};
    const int64_t rows = T * H, N = shape.N, C = shape.C;
    thread_local Scratch nope_scratch, rope_scratch, query_scratch, latent_scratch;
    float *nope = nope_scratch.reserve<float>(rows * N), *rope = rope_scratch.reserve<float>(rows * P);
    each_row(rows, [&](int64_t row) {
        const float* from = q + row * (N + P);
        for (int64_t d = 0; d < N; d++) nope[row * N + d] = from[d];
        rotate(from + N, rotation + row / H * P, P, [&](int64_t d, float value) { rope[row * P + d] = value * scale; });
    });
    if (!absorb) {
        parallel(H, [&](int64_t head) { materialised_head(shape, head, nope, rope, latents, *w_uk, *w_uv, scale, out); });
        return;
    }
    float* latent = latent_scratch.reserve<float>(rows * C);
    heads_linear(nope, T, H, *w_uk, latent);
    if (latents.kept == Kept::INT8) {
        absorbed_int8(shape, latent, rope, scale, latents, latent);
        heads_linear(latent, T, H, *w_uv, out);
        return;
    }
    const int64_t padded = round_up(shape.width(), STEP), passes = (rows + ROWS - 1) / ROWS;
    Query* queries = query_scratch.reserve<Query>(passes * ROWS * padded);
    std::memset(queries, 0, passes * ROWS * padded * sizeof(Query));
    each_row(rows, [&](int64_t row) {
        const auto put = [&](int64_t d, float value) { queries[query_place(row, d, padded)] = to_query(value); };
        for (int64_t c = 0; c < C; c++) put(c, latent[row * C + c] * scale);
        for (int64_t d = 0; d < P; d++) put(C + d, rope[row * P + d]);
    });
    absorbed_bf16(shape, queries, padded, latents, latent);
    heads_linear(latent, T, H, *w_uv, out);
}
