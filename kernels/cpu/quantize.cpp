// Quantises weights to codes and scales. `quant/nf4.py` and `quant/int8.py` explain the methods and are the reference.
#include <vector>

#include "api.hpp"
#include "matrix.hpp"

namespace dsv2 {
namespace {

// The constants of `quant.nf4`: candidate scales between 0.60 and 1.06 of a block's largest magnitude; for the search,
// weights are rounded to multiples of 1/BINS of that magnitude.
constexpr int CANDIDATES = 24, LISTED = 32;  // a row of errors, padded to whole registers
constexpr int BINS = 256, STEPS = 2 * BINS + 1;
constexpr float LEVELS[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                              -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                              0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                              0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

typedef uint16_t Errors __attribute__((vector_size(LANES * 4)));
constexpr int PARTS = LISTED / (LANES * 2);

struct Tables {
    float candidates[CANDIDATES], thresholds[15];
    Errors errors[STEPS][PARTS];  // squared error of a rounded weight with each candidate scale, in units of 1/6394

    Tables() {
        for (int i = 0; i < 15; i++) thresholds[i] = (LEVELS[i] + LEVELS[i + 1]) / 2;
        for (int c = 0; c < CANDIDATES; c++) candidates[c] = 0.60f + 0.46f * float(c) / (CANDIDATES - 1);
        for (int s = 0; s < STEPS; s++)
            for (int c = 0; c < LISTED; c++)
                errors[s][c / (LANES * 2)][c % (LANES * 2)] = c < CANDIDATES ? error(float(s - BINS) / BINS, candidates[c]) : 1023;
    }

    // The sum of 64 errors must fit in 16 bits. The largest error, 0.16, is that of a weight of 1 clipped to 0.6.
    uint16_t error(float x, float scale) const {
        float level = LEVELS[0];
        for (int i = 0; i < 15; i++)
            if (x / scale > thresholds[i]) level = LEVELS[i + 1];
        const float e = level * scale - x;
        return uint16_t(std::min(1023.0f, std::nearbyint(e * e * 6394.0f)));
    }
};

uint16_t to_fp16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // below 2^-14, subnormal in fp16: an integer times 2^-24
        float value;
        std::memcpy(&value, &magnitude, 4);
        return uint16_t(sign | uint32_t(std::lrint(value * 16777216.0f)));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return uint16_t(sign | (rounded - 0x38000000) >> 13);
}

void store_bytes(uint8_t* p, Int v) {
    typedef int8_t Char __attribute__((vector_size(LANES)));
    const Char bytes = __builtin_convertvector(v, Char);
    std::memcpy(p, &bytes, sizeof bytes);
}

float largest_magnitude(const float* x) {
    Vec largest{};
    for (int i = 0; i < BLOCK; i += LANES) largest = maximum(largest, absolute(load(x + i)));
    return max_lane(largest);
}

// Quantise 64 weights by the search that quant/nf4.py describes; returns their scale.
float search(const Tables& tables, const float* x, uint8_t* codes) {
    const float top = std::max(largest_magnitude(x), 1.17549435e-38f), inverse = 1.0f / top;
    int32_t steps[BLOCK];
    for (int i = 0; i < BLOCK; i += LANES) {
        const Int step = round_to_int(load(x + i) * inverse * float(BINS)) + BINS;
        std::memcpy(steps + i, &step, sizeof step);
    }
    Errors sums[PARTS] = {};
    for (int i = 0; i < BLOCK; i++)
        for (int k = 0; k < PARTS; k++) sums[k] += tables.errors[steps[i]][k];
    uint16_t errors[LISTED];
    std::memcpy(errors, sums, sizeof errors);
    const int best = int(std::min_element(errors, errors + CANDIDATES) - errors);
    const float unit = inverse / tables.candidates[best];
    Vec products{}, squares{};
    for (int i = 0; i < BLOCK; i += LANES) {
        const Vec weight = load(x + i), scaled = weight * unit;
        Int code{};
        Vec level = splat(LEVELS[0]);
        for (int k = 0; k < 15; k++) {
            const Int above = scaled > splat(tables.thresholds[k]);  // -1 where true
            code -= above;
            level += (Vec)((Int)splat(LEVELS[k + 1] - LEVELS[k]) & above);
        }
        store_bytes(codes + i, code);
        products = fma(weight, level, products);
        squares = fma(level, level, squares);
    }
    const float product = sum(products), square = sum(squares);
    return square > 0 ? product / square : 0.0f;  // a block of zeros has scale 0
}

// Store the 64 nf4 codes of row r in a tile.
void put_nf4(const uint8_t* codes, int64_t r, uint8_t* tile) {
    for (int octet = 0; octet < 8; octet++) {
        uint32_t low, high;  // four codes each, one per byte
        std::memcpy(&low, codes + octet * 8, 4);
        std::memcpy(&high, codes + octet * 8 + 4, 4);
        low |= high << 4;
        std::memcpy(tile + (octet * GROUP + r) * 4, &low, 4);
    }
}

float round_int8(const float* x, uint8_t* codes) {
    const float scale = from_fp16(to_fp16(largest_magnitude(x) / 127.0f));  // the scale as stored
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int i = 0; i < BLOCK; i += LANES) {
        const Vec limit = splat(127.0f), scaled = load(x + i) * inverse;
        const Vec bounded = maximum(scaled < limit ? scaled : limit, Vec{} - limit);
        const Int code = round_to_int(bounded);
        store_bytes(codes + i, code);
    }
    return scale;
}

void put_int8(const uint8_t* codes, int64_t r, uint8_t* tile) {
    for (int quad = 0; quad < 16; quad++) std::memcpy(tile + (quad * GROUP + r) * 4, codes + quad * 4, 4);
}

// Quantise x [rows, cols] block by block: quantize(weights, codes) gives the codes of 64 weights and returns their
// scale; put(codes, row, tile) stores them in a tile.
template <class Quantize, class Put>
void each_block(const float* x, int64_t rows, int64_t cols, int64_t tile_bytes, uint8_t* codes, uint16_t* scales,
                const Quantize& quantize, const Put& put) {
    const int64_t blocks = (cols + BLOCK - 1) / BLOCK, groups = (rows + GROUP - 1) / GROUP;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t r = 0; r < GROUP; r++) {
                float padded[BLOCK] = {};
                const int64_t row = g * GROUP + r, n = row < rows ? std::min<int64_t>(BLOCK, cols - b * BLOCK) : 0;
                const float* weights = x + row * cols + b * BLOCK;
                if (n < BLOCK) {
                    std::memcpy(padded, weights, n * sizeof(float));
                    weights = padded;
                }
                uint8_t block[BLOCK];
                const int64_t tile = g * blocks + b;
                scales[tile * GROUP + r] = to_fp16(quantize(weights, block));
                put(block, r, codes + tile * tile_bytes);
            }
}

}  // namespace
}  // namespace dsv2

using namespace dsv2;

API void dsv2_quantize_nf4(const float* x, int64_t rows, int64_t cols, uint8_t* codes, uint16_t* scales) {
    static const Tables tables;
    each_block(x, rows, cols, GROUP * BLOCK / 2, codes, scales,
               [&](const float* w, uint8_t* block) { return search(tables, w, block); }, put_nf4);
}

API void dsv2_quantize_int8(const float* x, int64_t rows, int64_t cols, uint8_t* codes, uint16_t* scales) {
    each_block(x, rows, cols, GROUP * BLOCK, codes, scales, round_int8, put_int8);
}
