// Rows of the KV cache in the layout of `kernels/latents.py`. A bf16 row is [latent C | rope key P]; an 8-bit row is
// [int8 codes C | bf16 scales, one per 64 codes | bf16 rope key P]. The cache is divided into blocks of CACHE_BLOCK
// rows; a block table lists the numbers of a sequence's blocks, the i-th for the positions from i · CACHE_BLOCK on.
#pragma once

#include <algorithm>

#include "simd.hpp"

namespace dsv2 {

// How rows are stored; `CACHES` in `__init__.py` has the same numbers.
enum class LatentDtype : int32_t { BF16 = 0, INT8 = 1 };

constexpr int64_t CACHE_BLOCK = 64;  // rows (tokens) per block of the KV cache

inline float load_half(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, sizeof half);
    return from_bf16(half);
}
inline void store_half(uint8_t* p, uint16_t half) { std::memcpy(p, &half, sizeof half); }

// One sequence's rows in a layer's KV cache.
struct Latents {
    const uint8_t* data;
    LatentDtype dtype;
    int64_t C, P;
    const int64_t* blocks;  // the block table: block numbers of positions [0, CACHE_BLOCK), [CACHE_BLOCK, …), …

    int64_t scale_blocks() const { return (C + BLOCK - 1) / BLOCK; }  // groups of 64 latents that share a scale
    // Byte offset of the rope key in a row.
    int64_t rope_at() const { return dtype == LatentDtype::INT8 ? C + 2 * scale_blocks() : 2 * C; }
    int64_t row_bytes() const { return rope_at() + 2 * P; }
    // Byte offset of position s in `data`.
    int64_t offset(int64_t s) const { return (blocks[s / CACHE_BLOCK] * CACHE_BLOCK + s % CACHE_BLOCK) * row_bytes(); }
    const uint8_t* row(int64_t s) const { return data + offset(s); }
    const uint8_t* rope_key(int64_t s) const { return row(s) + rope_at(); }
    float scale(int64_t s, int64_t block) const { return load_half(row(s) + C + 2 * block); }

    // The latent of position s, and below its rope key, converted to fp32.
    void latent(int64_t s, float* out) const {
        const uint8_t* from = row(s);
        if (dtype == LatentDtype::BF16) {
            for (int64_t c = 0; c < C; c++) out[c] = load_half(from + 2 * c);
            return;
        }
        for (int64_t b = 0; b < scale_blocks(); b++) {
            const float step = scale(s, b);
            for (int64_t c = b * BLOCK; c < std::min(C, (b + 1) * BLOCK); c++) out[c] = float(int8_t(from[c])) * step;
        }
    }
    void rope(int64_t s, float* out) const {
        const uint8_t* from = rope_key(s);
        for (int64_t d = 0; d < P; d++) out[d] = load_half(from + 2 * d);
    }
};

// The scale of 64 latents whose largest magnitude is `largest`: largest / 127, rounded up to bf16 so that the code 127
// reaches it.
inline uint16_t latent_scale(float largest) {
    const float exact = largest / 127.0f;
    uint32_t bits;
    std::memcpy(&bits, &exact, sizeof bits);
    return uint16_t((bits + 0xffff) >> 16);
}

// Quantise a normalised latent [C] into the codes and scales of an 8-bit row.
inline void quantize_latent(const float* x, int64_t C, uint8_t* row) {
    for (int64_t b = 0; b * BLOCK < C; b++) {
        const int64_t end = std::min(C, (b + 1) * BLOCK);
        float largest = 0;
        for (int64_t c = b * BLOCK; c < end; c++) {
            const float size = std::fabs(x[c]);
            largest = largest >= size || largest != largest ? largest : size;  // propagates NaN
        }
        const uint16_t half = latent_scale(largest);
        const float scale = from_bf16(half);
        const bool finite = scale > 0 && scale < INFINITY;  // else code · scale does not depend on the code
        store_half(row + C + 2 * b, half);
        for (int64_t c = b * BLOCK; c < end; c++) row[c] = finite ? uint8_t(int32_t(std::nearbyint(x[c] / scale))) : 0;
    }
}

}  // namespace dsv2
