// Latent attention over a KV cache of bf16 or 8-bit rows, in its two forms.
//
// Absorbed (few queries): scores and sums are computed in latent space, and the cache is read once for several heads.
// Code: `attention_bf16.cpp` for bf16 rows, `attention_int8.cpp` for 8-bit rows.
// Materialised (many queries): for one head at a time, keys and values are rebuilt from the latents KEYS positions at a
// time, with a running softmax (as in flash attention).
#include "attention.hpp"

#include "api.hpp"
#include "rows.hpp"

namespace dsv2 {
namespace {

#if DSV2_AVX512
constexpr int GEMM_ROWS = 12;
#else
constexpr int GEMM_ROWS = 6;
#endif

// The right operand of a product is stored as panels of PANEL columns, each row-major, and used DEPTH rows at a time,
// so that these stay in the L1 cache.
constexpr int64_t PANEL = 2 * LANES;
constexpr int64_t DEPTH = 256;

template <int M>
inline void gemm_tile(const float* a, int64_t am, int64_t ak, const float* panel, float* c, int64_t ldc, int64_t K, bool add) {
    Vec sums[M][2];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) sums[m][v] = add ? load(c + m * ldc + v * LANES) : Vec{};
    for (int64_t k = 0; k < K; k++) {
        const Vec right[2] = {load(panel + k * PANEL), load(panel + k * PANEL + LANES)};
        for (int m = 0; m < M; m++) {
            const Vec left = splat(a[m * am + k * ak]);
            for (int v = 0; v < 2; v++) sums[m][v] = fma(left, right[v], sums[m][v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) store(c + m * ldc + v * LANES, sums[m][v]);
}

template <int M>
inline void gemm_rows(int64_t rows, const float* a, int64_t am, int64_t ak, const float* panel, float* c, int64_t ldc, int64_t K,
                      bool add) {
    if constexpr (M > 0) {
        for (; rows >= M; rows -= M, a += M * am, c += M * ldc) gemm_tile<M>(a, am, ak, panel, c, ldc, K, add);
        gemm_rows<M / 2>(rows, a, am, ak, panel, c, ldc, K, add);
    }
}

// c[m][n] = (or +=) Σ_k a[m * am + k * ak] · panel[k][n] for the PANEL columns n.
void gemm(int64_t M, int64_t K, const float* a, int64_t am, int64_t ak, const float* panel, float* c, int64_t ldc, bool add) {
    for (int64_t k = 0; k < K; k += DEPTH)
        gemm_rows<GEMM_ROWS>(M, a + k * ak, am, ak, panel + k * PANEL, c, ldc, std::min(DEPTH, K - k), add || k);
}

constexpr int64_t KEYS = 128;  // positions whose scores against a panel of queries are computed at a time

// Attention of one head over one sequence: from nope [T, H, N] and rope [T, H, P], the latter rotated and scaled, to
// out [T, H, V]. Lanes are queries.
void materialised_head(const Shape& s, const Tokens& tokens, int64_t head, const float* nope, const float* rope,
                       const Matrix& w_uk, const Matrix& w_uv, float scale, float* out) {
    const int64_t count = tokens.count, length = tokens.length;
    const int64_t N = round_up(s.N, PANEL), V = round_up(s.V, PANEL), T = round_up(count, PANEL), K = s.N + s.P, ldk = N + s.P;
    const int64_t sizes[] = {s.C * N, s.C * V, K * T, V * T, 2 * T, KEYS * s.C, KEYS * ldk, KEYS * V, KEYS * PANEL, N};
    int64_t all = 0;
    for (int64_t size : sizes) all += round_up(size, 16);
    thread_local Scratch scratch;
    float *next = scratch.reserve<float>(all), *parts[10];
    for (int i = 0; i < 10; i++) parts[i] = next, next += round_up(sizes[i], 16);
    float *uk = parts[0], *uv = parts[1], *query = parts[2], *sums = parts[3], *largest = parts[4], *total = largest + T;
    float *latent = parts[5], *key = parts[6], *value = parts[7], *scores = parts[8], *row_of_uk = parts[9];

    std::memset(uk, 0, (largest - uk) * sizeof(float));
    std::memset(row_of_uk, 0, N * sizeof(float));
    for (int64_t c = 0; c < s.C; c++) {
        w_uk.dequantize_row(head * s.C + c, row_of_uk, 1);
        for (int64_t n = 0; n < N; n += PANEL) std::memcpy(uk + n * s.C + c * PANEL, row_of_uk + n, PANEL * sizeof(float));
    }
    for (int64_t v = 0; v < s.V; v++)
        w_uv.dequantize_row(head * s.V + v, uv + v / PANEL * PANEL * s.C + v % PANEL, PANEL);
    for (int64_t t = 0; t < count; t++) {
        const int64_t row = t * s.H + head;
        float* to = query + t / PANEL * PANEL * K + t % PANEL;
        for (int64_t d = 0; d < s.N; d++) to[d * PANEL] = nope[row * s.N + d] * scale;
        for (int64_t d = 0; d < s.P; d++) to[(s.N + d) * PANEL] = rope[row * s.P + d];
    }
    for (int64_t t = 0; t < T; t++) largest[t] = -INFINITY, total[t] = 0;

    for (int64_t from = 0; from < length; from += KEYS) {
        const int64_t n = std::min(KEYS, length - from);
        for (int64_t k = 0; k < n; k++) tokens.latents.latent(from + k, latent + k * s.C);
        for (int64_t i = 0; i < N; i += PANEL) gemm(n, s.C, latent, s.C, 1, uk + i * s.C, key + i, ldk, false);
        for (int64_t i = 0; i < V; i += PANEL) gemm(n, s.C, latent, s.C, 1, uv + i * s.C, value + i, V, false);
        for (int64_t k = 0; k < n; k++) tokens.latents.rope(from + k, key + k * ldk + s.N);
        for (int64_t t0 = 0; t0 < T; t0 += PANEL) {
            const int64_t end = std::min(t0 + PANEL, count);
            if (from >= tokens.visible(end - 1)) continue;
            float* panel = sums + t0 * V;
            gemm(n, K, key, ldk, 1, query + t0 * K, scores, PANEL, false);
            for (int64_t t = t0; t < end; t++)
                for (int64_t k = std::max<int64_t>(0, tokens.visible(t) - from); k < n; k++) scores[k * PANEL + t - t0] = -INFINITY;
            for (int64_t i = 0; i < PANEL; i += LANES) {
                Vec top = load(largest + t0 + i), sum_{};
                const Vec old = top;
                for (int64_t k = 0; k < n; k++) top = maximum(top, load(scores + k * PANEL + i));
                const Vec base = top > -INFINITY ? top : Vec{};  // 0: the query sees none of these positions
                for (int64_t k = 0; k < n; k++) {
                    const Vec p = exponential(load(scores + k * PANEL + i) - base);
                    store(scores + k * PANEL + i, p);
                    sum_ += p;
                }
                const Vec keep = exponential(old - base);
                store(total + t0 + i, load(total + t0 + i) * keep + sum_);
                store(largest + t0 + i, top);
                for (int64_t v = 0; v < s.V; v++) store(panel + v * PANEL + i, load(panel + v * PANEL + i) * keep);
            }
            gemm(s.V, n, value, 1, V, scores, panel, PANEL, true);
        }
    }
    for (int64_t t = 0; t < count; t++) {
        const float* from = sums + t / PANEL * PANEL * V + t % PANEL;
        for (int64_t v = 0; v < s.V; v++) out[(t * s.H + head) * s.V + v] = from[v * PANEL] / total[t];
    }
}

}  // namespace
}  // namespace dsv2

using namespace dsv2;

API void dsv2_attention(const float* q, const float* rotation, const void* cache, int32_t dtype,
                        const int64_t* block_tables, int64_t table_size, const int64_t* offsets, const int64_t* absorb,
                        int64_t sequences, const Matrix* w_uk, const Matrix* w_uv, float scale, int64_t H, int64_t P,
                        float* out) {
    const Shape shape{H, w_uk->cols, P, w_uv->cols, w_uv->rows / H};
    const int64_t rows = offsets[sequences] * H, N = shape.N, C = shape.C, V = shape.V;
    thread_local Scratch nope_scratch, rope_scratch, latent_scratch;
    float *nope = nope_scratch.reserve<float>(rows * N), *rope = rope_scratch.reserve<float>(rows * P);
    each_row(rows, [&](int64_t row) {
        const float* from = q + row * (N + P);
        for (int64_t d = 0; d < N; d++) nope[row * N + d] = from[d];
        rotate(from + N, rotation + row / H * P, P, [&](int64_t d, float value) { rope[row * P + d] = value * scale; });
    });
    std::vector<Tokens> together;  // consecutive sequences that are absorbed
    const auto tokens_of = [&](int64_t b) {
        const int64_t* table = block_tables + b * table_size;
        const int64_t count = offsets[b + 1] - offsets[b];
        const Latents latents{static_cast<const uint8_t*>(cache), LatentDtype(dtype), C, P, table + 1};
        return Tokens{offsets[b], count, *table + count, latents};
    };
    for (int64_t b = 0; b < sequences; b++) {
        if (offsets[b + 1] > offsets[b]) together.push_back(tokens_of(b));
        if (together.empty() || (absorb[b] && b + 1 < sequences && absorb[b + 1])) continue;
        const int64_t first = together.front().first, count = together.back().first + together.back().count - first;
        const float *from = nope + first * H * N, *rotated = rope + first * H * P;
        float* to = out + first * H * V;
        if (absorb[b]) {
            float* latent = latent_scratch.reserve<float>(count * H * C);
            heads_linear(from, count, H, *w_uk, latent);
            (LatentDtype(dtype) == LatentDtype::INT8 ? absorbed_int8 : absorbed_bf16)(shape, together, latent, rotated, scale, latent);
            heads_linear(latent, count, H, *w_uv, to);
        } else {
            parallel(H, [&](int64_t head) { materialised_head(shape, together[0], head, from, rotated, *w_uk, *w_uv, scale, to); });
        }
        together.clear();
    }
}
