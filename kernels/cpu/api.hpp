// The entry points of the native kernels: plain C functions over raw pointers; no torch or Python type is passed.
//
// `_SIGNATURES` in `__init__.py` declares the same functions to ctypes; tests/test_kernels.py compares the two. Arrays
// are contiguous and row-major, activations float32. `kernels/reference.py` defines what each function computes, under
// the same name (latents: write_latents).
#pragma once

#include "matrix.hpp"

#define API extern "C" __attribute__((visibility("default")))

namespace dsv2 {

// One recorded call: the number of a function (see dsv2_recordable) and its arguments, each in the low bytes of a word.
constexpr int CALL_ARGUMENTS = 15;
struct Call {
    int64_t function;
    uint64_t arguments[CALL_ARGUMENTS];
};

}  // namespace dsv2

// y [tokens, rows of m] = x · mᵀ. With heads > 1, x is [tokens, heads, columns of m] and the rows of m are divided
// among the heads.
API void dsv2_linear(const float* x, int64_t tokens, int64_t heads, const dsv2::Matrix* m, float* y);
// y = down(silu(gate(x)) · up(x)).
API void dsv2_swiglu(const float* x, int64_t tokens, const dsv2::Matrix* gate, const dsv2::Matrix* up,
                     const dsv2::Matrix* down, float* y);
// Weighted sum of the routed experts. records [experts, stride bytes]; ids [tokens, k], each below `experts`; weights
// [tokens, k]; y [tokens, hidden].
API void dsv2_experts(const float* x, int64_t tokens, const uint8_t* records, int64_t stride, int64_t experts,
                      int32_t format, int64_t hidden, int64_t intermediate, const int64_t* ids, const float* weights,
                      int64_t k, float* y);
// Outputs of single token-expert pairs: y[i] = expert in records[slot[i]] applied to x[tokens[i]]. x [x_rows, hidden];
// records [slots, stride bytes]; y [pairs, hidden].
API void dsv2_expert_outputs(const float* x, int64_t x_rows, const uint8_t* records, int64_t stride, int64_t slots,
                             int32_t format, int64_t hidden, int64_t intermediate, const int64_t* tokens,
                             const int64_t* slot, int64_t pairs, float* y);
// y[t] += weights[t, i] · outputs[rows[t, i]] for i in [0, k), in ascending order of ids[t, i]; negative rows are
// skipped. y [tokens, size].
API void dsv2_combine(const float* outputs, int64_t tokens, int64_t k, int64_t size, const int64_t* rows,
                      const int64_t* ids, const float* weights, float* y);
// Causal latent attention of the tokens of several sequences. q [T, H, N + P], the rope part not yet rotated; rotation
// [T, P / 2] of (cos, sin); cache: a layer's KV cache, whose rows are stored as `dtype` (latents.hpp); block_tables
// [sequences, table_size]: for each sequence the number of positions before these queries, then its block numbers;
// offsets [sequences + 1]: the first row of each, then T; absorb [sequences]: the form of each, 1 or 0 (attention.cpp);
// w_uk [H·C, N]; w_uv [H·V, C]; out [T, H·V].
API void dsv2_attention(const float* q, const float* rotation, const void* cache, int32_t dtype,
                        const int64_t* block_tables, int64_t table_size, const int64_t* offsets, const int64_t* absorb,
                        int64_t sequences, const dsv2::Matrix* w_uk, const dsv2::Matrix* w_uv, float scale, int64_t H,
                        int64_t P, float* out);
// y = x / sqrt(mean(x²) + eps) · weight for each of `rows` rows.
API void dsv2_rms_norm(const float* x, int64_t rows, int64_t size, const float* weight, float eps, float* y);
// y = a + b.
API void dsv2_add(const float* a, const float* b, int64_t count, float* y);
// Append rows to the sequences of a step in a layer's KV cache (cache, dtype and sequences as in dsv2_attention) from
// kv_a [T, latent + rope]: the latent is normalised, the rope key rotated.
API void dsv2_latents(const float* kv_a, int64_t latent, int64_t rope, const float* weight, float eps,
                      const float* rotation, const int64_t* block_tables, int64_t table_size, const int64_t* offsets,
                      int64_t sequences, void* cache, int32_t dtype);
// Router: softmax(gate · x), then the best `k` experts of the best `topk_group` of `groups` groups. A group is rated by
// its best expert, and the scores of experts in other groups count as 0.
API void dsv2_route(const float* x, int64_t tokens, int64_t hidden, const float* gate, int64_t experts, int64_t k,
                    int64_t groups, int64_t topk_group, int32_t normalise, float scaling, int64_t* ids, float* weights);
// Rows `ids` of the embedding, dequantised to fp32.
API void dsv2_embedding(const int64_t* ids, int64_t tokens, const dsv2::Matrix* m, float* y);
// Quantise x [rows, cols] into the stored layout; on the calling thread alone.
API void dsv2_quantize_nf4(const float* x, int64_t rows, int64_t cols, uint8_t* codes, uint16_t* scales);
API void dsv2_quantize_int8(const float* x, int64_t rows, int64_t cols, uint8_t* codes, uint16_t* scales);
// The name, without "dsv2_", of the function with this number in Call::function; null past the last one. These are the
// functions that a recording can replay; the only list of them is in replay.cpp.
API const char* dsv2_recordable(int64_t function);
// Repeat recorded calls in order; unless `seconds` [count] is null, add the duration of each call to it.
API void dsv2_replay(const dsv2::Call* calls, int64_t count, double* seconds);
// Replace the thread pool by one of `count` threads, the caller among them; thread i > 0 is pinned to cpus[i] unless
// `cpus` is null.
API void dsv2_set_threads(int32_t count, const int32_t* cpus);
// See set_spin in pool.hpp.
API void dsv2_set_spin(int64_t microseconds);
// Read all bytes once with all threads, which measures memory bandwidth. Returns the sum of the 64-bit words, so that
// the compiler cannot drop the reads.
API uint64_t dsv2_read(const uint8_t* data, int64_t nbytes);
