// A row of the latent cache, as `kernels/latents.py` lays it out: bf16 [latent C | rope key P], or 8-bit
// [codes int8 C | scales bf16, one a block of 64 | rope key bf16 P]. Rows lie in pages, and a table says which page has
// which positions of a block_table.
#pragma once

#include <algorithm>

#include "simd.hpp"

namespace dsv2 {

enum class Kept : int32_t { BF16 = 0, INT8 = 1 };

constexpr int64_t CACHE_BLOCK = 64;  // rows of a page

inline float load_half(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, sizeof half);
    return from_bf16(half);
}
inline void store_half(uint8_t* p, uint16_t half) { std::memcpy(p, &half, sizeof half); }

// A block_table in a layer's cache.
struct Latents {
    const uint8_t* data;
    Kept kept;
    int64_t C, P;
    const int64_t* pages;  // of positions [0, CACHE_BLOCK), [CACHE_BLOCK, 2 · CACHE_BLOCK), …

    int64_t blocks() const { return (C + BLOCK - 1) / BLOCK; }
    int64_t rope_at() const { return kept == Kept::INT8 ? C + 2 * blocks() : 2 * C; }  // bytes from a row's start
    int64_t row_bytes() const { return rope_at() + 2 * P; }
    int64_t place(int64_t s) const { return (pages[s / CACHE_BLOCK] * CACHE_BLOCK + s % CACHE_BLOCK) * row_bytes(); }  // bytes from `data`
    const uint8_t* row(int64_t s) const { return data + place(s); }
    const uint8_t* rope_key(int64_t s) const { return row(s) + rope_at(); }
    float scale(int64_t s, int64_t block) const { return load_half(row(s) + C + 2 * block); }

    // Row s in fp32.
    void latent(int64_t s, float* out) const {
        const uint8_t* from = row(s);
        if (kept == Kept::BF16) {
            for (int64_t c = 0; c < C; c++) out[c] = load_half(from + 2 * c);
            return;
        }
        for (int64_t b = 0; b < blocks(); b++) {
            const float step = scale(s, b);
            for (int64_t c = b * BLOCK; c < std::min(C, (b + 1) * BLOCK); c++) out[c] = float(int8_t(from[c])) * step;
        }
    }
    void rope(int64_t s, float* out) const {
        const uint8_t* from = rope_key(s);
        for (int64_t d = 0; d < P; d++) out[d] = load_half(from + 2 * d);
    }
};

// The scale of a block whose largest magnitude is `largest`: the next bf16 number that lets 127 reach it.
inline uint16_t latent_scale(float largest) {
    const float exact = largest / 127.0f;
    uint32_t bits;
    std::memcpy(&bits, &exact, sizeof bits);
    return uint16_t((bits + 0xffff) >> 16);
}

// A normed latent [C] to its codes and scales.
inline void quantize_latent(const float* x, int64_t C, uint8_t* row) {
    for (int64_t b = 0; b * BLOCK < C; b++) {
        const int64_t end = std::min(C, (b + 1) * BLOCK);
        float largest = 0;
        for (int64_t c = b * BLOCK; c < end; c++) {
            const float size = std::fabs(x[c]);
            largest = largest >= size || largest != largest ? largest : size;  // NaN stays NaN
        }
        const uint16_t half = latent_scale(largest);
        const float scale = from_bf16(half);
        const bool sound = scale > 0 && scale < INFINITY;  // else no code matters
        store_half(row + C + 2 * b, half);
        for (int64_t c = b * BLOCK; c < end; c++) row[c] = sound ? uint8_t(int32_t(std::nearbyint(x[c] / scale))) : 0;
    }
}

}  // namespace dsv2
