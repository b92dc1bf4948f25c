// The entry points: plain C over raw pointers, no type of torch or Python crosses. `__init__.py` has the same list.
#pragma once

#include "matrix.hpp"

#define API extern "C" __attribute__((visibility("default")))

namespace dsv2 {

// A recorded call: a function of replay.cpp's list and its arguments, each in the low bytes of a word.
constexpr int CALL_ARGUMENTS = 13;
struct Call {
    int64_t function;
    uint64_t arguments[CALL_ARGUMENTS];
};

}  // namespace dsv2

API void dsv2_linear(const float* x, int64_t tokens, int64_t heads, const dsv2::Matrix* m, float* y);
API void dsv2_swiglu(const float* x, int64_t tokens, const dsv2::Matrix* gate, const dsv2::Matrix* up,
                     const dsv2::Matrix* down, float* y);
// records [experts, stride]; ids [tokens, k] below `experts`; weights [tokens, k]; y [tokens, hidden].
API void dsv2_experts(const float* x, int64_t tokens, const uint8_t* records, int64_t stride, int64_t experts,
                      int32_t format, int64_t hidden, int64_t intermediate, const int64_t* ids, const float* weights,
                      int64_t k, float* y);
// y [pairs, hidden]: row i is the expert in records[slot[i]] of x[tokens[i]]; records [slots, stride], x [x_rows, hidden].
API void dsv2_expert_outputs(const float* x, int64_t x_rows, const uint8_t* records, int64_t stride, int64_t slots,
                             int32_t format, int64_t hidden, int64_t intermediate, const int64_t* tokens,
                             const int64_t* slot, int64_t pairs, float* y);
// y [tokens, size] += weights[t, i] · outputs[rows[t, i]] for every i < k, by ascending ids[t, i]; rows below 0 are left
// out.
API void dsv2_combine(const float* outputs, int64_t tokens, int64_t k, int64_t size, const int64_t* rows,
                      const int64_t* ids, const float* weights, float* y);
// q [T, H, N + P], not yet rotated; rotation [T, P / 2] of (cos, sin); cache: pages of rows of the kind `kept`
// (latents.hpp); block_table: the number of positions before this step, then the pages of all, as far as they fill them;
// w_uk [H·C, N]; w_uv [H·V, C]; out [T, H·V].
API void dsv2_attention(const float* q, const float* rotation, const void* cache, int32_t kept, const int64_t* block_table,
                        const dsv2::Matrix* w_uk, const dsv2::Matrix* w_uv, float scale, int64_t T, int64_t H, int64_t P,
                        int32_t absorb, float* out);
// y = x / sqrt(mean(x²) + eps) · weight for each of `rows` rows.
API void dsv2_rms_norm(const float* x, int64_t rows, int64_t size, const float* weight, float eps, float* y);
// a + b.
API void dsv2_add(const float* a, const float* b, int64_t count, float* y);
// The next rows of a block_table (as above) in a cache, from kv_a [tokens, latent + rope]: the first part normed, the second
// rotated.
API void dsv2_latents(const float* kv_a, int64_t tokens, int64_t latent, int64_t rope, const float* weight, float eps,
                      const float* rotation, const int64_t* block_table, void* cache, int32_t kept);
// softmax(gate · x), then the best `k` experts of the best `topk_group` groups (a group is as good as its best expert;
// the scores of the others count as 0); see `reference.route`.
API void dsv2_route(const float* x, int64_t tokens, int64_t hidden, const float* gate, int64_t experts, int64_t k,
                    int64_t groups, int64_t topk_group, int32_t normalise, float scaling, int64_t* ids, float* weights);
// Rows `ids` of the embedding in fp32.
API void dsv2_embedding(const int64_t* ids, int64_t tokens, const dsv2::Matrix* m, float* y);
API void dsv2_quantize_nf4(const float* x, int64_t rows, int64_t cols, uint8_t* codes, uint16_t* scales);
API void dsv2_quantize_int8(const float* x, int64_t rows, int64_t cols, uint8_t* codes, uint16_t* scales);
// Make recorded calls in their order; unless `seconds` [count] is null, add to it what each has taken.
API void dsv2_replay(const dsv2::Call* calls, int64_t count, double* seconds);
// Replace the pool: `count` threads with the caller; thread i > 0 is pinned to cpus[i] unless `cpus` is null.
API void dsv2_set_threads(int32_t count, const int32_t* cpus);
// Read the bytes once with all threads: what memory gives when nothing is computed. Returns their sum as numbers.
API uint64_t dsv2_read(const uint8_t* data, int64_t nbytes);
