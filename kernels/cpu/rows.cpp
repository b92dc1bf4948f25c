// The small kernels between the products: norms, rotation, writing to the KV cache, the router, the embedding.
#include <algorithm>
#include <vector>

#include "api.hpp"
#include "latents.hpp"
#include "matrix.hpp"
#include "rows.hpp"

namespace dsv2 {
namespace {

void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* y) {
    Vec squares{};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (int64_t k = i; k < size; k++) total += x[k] * x[k];
    const float factor = 1.0f / std::sqrt(total / float(size) + eps);
    for (i = 0; i + LANES <= size; i += LANES) store(y + i, load(x + i) * factor * load(weight + i));
    for (; i < size; i++) y[i] = x[i] * factor * weight[i];
}

float dot(const float* a, const float* b, int64_t size) {
    Vec sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        for (int k = 0; k < 4; k++) sums[k] = fma(load(a + i + k * LANES), load(b + i + k * LANES), sums[k]);
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < size; i++) total += a[i] * b[i];
    return total;
}

// Move the `k` of `order` (indices into scores) with the highest scores to its front, best first; ties go to the lower
// index.
void select_best(const float* scores, int32_t* order, int64_t size, int64_t k) {
    std::partial_sort(order, order + k, order + size, [&](int32_t a, int32_t b) {
        return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
}

}  // namespace
}  // namespace dsv2

using namespace dsv2;

API void dsv2_rms_norm(const float* x, int64_t rows, int64_t size, const float* weight, float eps, float* y) {
    each_row(rows, [&](int64_t t) { rms_norm(x + t * size, weight, eps, size, y + t * size); });
}

API void dsv2_add(const float* a, const float* b, int64_t count, float* y) {
    constexpr int64_t ROW = 1 << 12;
    each_row((count + ROW - 1) / ROW, [&](int64_t row) {
        for (int64_t i = row * ROW; i < std::min((row + 1) * ROW, count); i++) y[i] = a[i] + b[i];
    });
}

API void dsv2_latents(const float* kv_a, int64_t latent, int64_t rope, const float* weight, float eps,
                      const float* rotation, const int64_t* block_tables, int64_t table_size, const int64_t* offsets,
                      int64_t sequences, void* cache, int32_t dtype) {
    each_row(offsets[sequences], [&](int64_t t) {
        thread_local Scratch scratch;
        float* normed = scratch.reserve<float>(latent);
        const int64_t sequence = std::upper_bound(offsets, offsets + sequences, t) - offsets - 1;
        const int64_t* table = block_tables + sequence * table_size;
        const Latents latents{static_cast<uint8_t*>(cache), LatentDtype(dtype), latent, rope, table + 1};
        const float* x = kv_a + t * (latent + rope);
        uint8_t* row = static_cast<uint8_t*>(cache) + latents.offset(*table + t - offsets[sequence]);
        rms_norm(x, weight, eps, latent, normed);
        if (latents.dtype == LatentDtype::INT8) {
            quantize_latent(normed, latent, row);
        } else {
            for (int64_t i = 0; i < latent; i++) store_half(row + 2 * i, to_bf16(normed[i]));
        }
        uint8_t* key = row + latents.rope_at();
        rotate(x + latent, rotation + t * rope, rope, [&](int64_t i, float v) { store_half(key + 2 * i, to_bf16(v)); });
    });
}

API void dsv2_route(const float* x, int64_t tokens, int64_t hidden, const float* gate, int64_t experts, int64_t k,
                    int64_t groups, int64_t topk_group, int32_t normalise, float scaling, int64_t* ids, float* weights) {
    std::vector<float> logits(tokens * experts);
    const int64_t step = tokens == 1 ? 16 : 1;  // threads divide the experts of one token, or the tokens
    if (tokens == 1) {
        parallel((experts + step - 1) / step, [&](int64_t i) {
            for (int64_t e = i * step; e < std::min((i + 1) * step, experts); e++)
                logits[e] = dot(x, gate + e * hidden, hidden);
        });
    } else {
        parallel(tokens, [&](int64_t t) {
            for (int64_t e = 0; e < experts; e++) logits[t * experts + e] = dot(x + t * hidden, gate + e * hidden, hidden);
        });
    }
    each_row(tokens, [&](int64_t t) {
        float* scores = logits.data() + t * experts;
        const float largest = *std::max_element(scores, scores + experts);
        double total = 0;
        for (int64_t e = 0; e < experts; e++) total += scores[e] = std::exp(scores[e] - largest);
        for (int64_t e = 0; e < experts; e++) scores[e] = float(scores[e] / total);
        std::vector<int32_t> order(experts);
        if (groups > 1) {
            const int64_t size = experts / groups;
            std::vector<float> tops(groups);
            std::vector<int32_t> group_order(groups);
            for (int64_t g = 0; g < groups; g++) {
                group_order[g] = int32_t(g);
                tops[g] = *std::max_element(scores + g * size, scores + (g + 1) * size);
            }
            select_best(tops.data(), group_order.data(), groups, topk_group);
            for (int64_t g = topk_group; g < groups; g++) std::fill_n(scores + group_order[g] * size, size, 0.0f);
        }
        for (int64_t e = 0; e < experts; e++) order[e] = int32_t(e);
        select_best(scores, order.data(), experts, k);
        float chosen = 0;
        for (int64_t i = 0; i < k; i++) chosen += scores[order[i]];
        const float factor = normalise && k > 1 ? 1.0f / (chosen + 1e-20f) : scaling;
        for (int64_t i = 0; i < k; i++) {
            ids[t * k + i] = order[i];
            weights[t * k + i] = scores[order[i]] * factor;
        }
    });
}

API void dsv2_embedding(const int64_t* ids, int64_t tokens, const Matrix* m, float* y) {
    each_row(tokens, [&](int64_t t) { m->dequantize_row(ids[t], y + t * m->cols, 1); });
}
