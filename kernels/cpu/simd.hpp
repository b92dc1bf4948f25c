// Vector operations for the instruction set this file is compiled for: AVX-512 with VNNI, AVX2 with FMA and F16C, or
// portable code on the compiler's vector types. The kernels are written once, on top of these.
//
// The lanes of a matrix product are matrix rows, so that it needs no sum across lanes. A panel is LANES rows:
// PANEL_GROUPS groups of 8.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define DSV2_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define DSV2_AVX2 1
#endif
#ifndef DSV2_AVX512
#define DSV2_AVX512 0
#endif
#ifndef DSV2_AVX2
#define DSV2_AVX2 0
#endif
#if DSV2_AVX512 && defined(__AVX512BF16__)
#define DSV2_BF16 1
#else
#define DSV2_BF16 0
#endif

namespace dsv2 {

#if DSV2_AVX512
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int GROUP = 8, BLOCK = 64;  // a tile of the stored layout: 8 rows x 64 columns
constexpr int PANEL_GROUPS = LANES / GROUP;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));
typedef uint16_t Short __attribute__((vector_size(LANES * 2)));

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
// x - 0 is x for every x, so no subtraction is compiled; x + 0 is not, for x = -0.
inline Vec splat(float x) { return x - Vec{}; }
inline Int splat_int(int32_t x) { return Int{} + x; }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline Vec to_float(Int v) { return __builtin_convertvector(v, Vec); }

inline Vec fma(Vec a, Vec b, Vec c) {
#if DSV2_AVX512
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif DSV2_AVX2
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline float sum(Vec v) {
#if DSV2_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[LANES], total = 0;
    store(lanes, v);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
    total = lanes[0];
    return total;
#endif
}

// out[i] = the sum of v[i]'s lanes, for four at once.
inline void sum_four(const Vec (&v)[4], float* out) {
#if DSV2_AVX512 || DSV2_AVX2
#if DSV2_AVX512
    __m256 half[4];
    for (int i = 0; i < 4; i++)
        half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
#else
    const __m256 half[4] = {(__m256)v[0], (__m256)v[1], (__m256)v[2], (__m256)v[3]};
#endif
    const __m256 ab = _mm256_hadd_ps(half[0], half[1]), cd = _mm256_hadd_ps(half[2], half[3]);
    const __m256 all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    for (int i = 0; i < 4; i++) out[i] = sum(v[i]);
#endif
}

// Undo the lane order that unpack instructions leave in two registers, whose 128-bit parts alternate: to column order.
inline void in_order(Vec (&v)[2]) {
#if DSV2_AVX512
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const __m512 low = (__m512)v[0], high = (__m512)v[1];
    v[0] = (Vec)_mm512_permutex2var_ps(low, first, high);
    v[1] = (Vec)_mm512_permutex2var_ps(low, second, high);
#elif DSV2_AVX2
    const __m256 low = (__m256)v[0], high = (__m256)v[1];
    v[0] = (Vec)_mm256_permute2f128_ps(low, high, 0x20);
    v[1] = (Vec)_mm256_permute2f128_ps(low, high, 0x31);
#else
    (void)v;
#endif
}

#if !DSV2_AVX512
// Interleave the lanes of two registers: v[0] has the even columns and v[1] the odd ones; afterwards both are in column
// order.
inline void zip(Vec (&v)[2]) {
#if DSV2_AVX2
    const __m256 a = (__m256)v[0], b = (__m256)v[1];
    v[0] = (Vec)_mm256_unpacklo_ps(a, b);
    v[1] = (Vec)_mm256_unpackhi_ps(a, b);
    in_order(v);
#else
    const Vec a = v[0], b = v[1];
    for (int i = 0; i < 2 * LANES; i++) v[i / LANES][i % LANES] = i % 2 ? b[i / 2] : a[i / 2];
#endif
}
#endif

inline float max_lane(Vec v) {
    float lanes[LANES];
    store(lanes, v);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
    return lanes[0];
}

inline Vec absolute(Vec v) { return (Vec)((Int)v & 0x7fffffff); }

// Round to the nearest integer, ties to even; |v| must be below 2^22.
inline Int round_to_int(Vec v) {
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the integer in the lowest bits
    return (Int)(v + magic) - (Int)magic;
}

// e^x with a relative error of about 1e-7 (Cody and Waite's range reduction, then a polynomial of degree 6); 0 below
// -87.3.
inline Vec exponential(Vec x) {
    const Vec low = splat(-87.3f), clamped = maximum(x, low);
    const Int n = round_to_int(clamped * 1.44269504f);
    const Vec k = to_float(n);
    Vec r = fma(k, splat(-0.693145752f), clamped);
    r = fma(k, splat(-1.42860677e-6f), r);
    Vec p = splat(1.0f / 720);
    p = fma(p, r, splat(1.0f / 120));
    p = fma(p, r, splat(1.0f / 24));
    p = fma(p, r, splat(1.0f / 6));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    const Vec result = (Vec)((Int)p + (n << 23));
    return x < low ? Vec{} : (x == x ? result : x);  // NaN stays NaN
}

inline Vec silu(Vec x) {
    const Vec bounded = x > 88.0f ? splat(88.0f) : x;  // so that e^-x neither overflows nor underflows
    return x / (exponential(Vec{} - bounded) + 1.0f);
}

// A bfloat16 number is the upper half of a float.
inline Vec load_bf16(const uint16_t* p) {
#if DSV2_AVX512
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif DSV2_AVX2
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    Short half;
    std::memcpy(&half, p, sizeof half);
    return (Vec)(__builtin_convertvector(half, Int) << 16);
#endif
}
inline float from_bf16(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint16_t to_bf16(float x) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_fp16(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    uint32_t bits;
    float x;
    if (magnitude >= 0x7c00) {
        bits = sign | 0x7f800000 | magnitude << 13;
    } else if (magnitude < 0x400) {  // subnormal: an integer times 2^-24
        x = float(magnitude) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &x, 4);
        bits |= sign;
    } else {
        bits = sign | ((magnitude << 13) + 0x38000000);
    }
    std::memcpy(&x, &bits, 4);
    return x;
}

// The fp16 scales of a panel's rows, 8 from each group of rows.
inline Vec load_scales(const uint16_t* first, const uint16_t* second) {
#if DSV2_AVX512
    const __m128i a = _mm_loadu_si128((const __m128i*)first), b = _mm_loadu_si128((const __m128i*)second);
    return (Vec)_mm512_cvtph_ps(_mm256_set_m128i(b, a));
#elif DSV2_AVX2
    (void)second;
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)first));
#else
    (void)second;
    Vec v;
    for (int i = 0; i < LANES; i++) v[i] = from_fp16(first[i]);
    return v;
#endif
}

// The levels of NF4 as 8-bit integers: level ≈ (NF4_CODES[code] - NF4_BIAS) * NF4_STEP. Of all such grids this one has
// the least squared error over Gaussian weights (0.30 % of their norm).
constexpr int8_t NF4_CODES[16] = {-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124};
constexpr float NF4_BIAS = 0.16f, NF4_STEP = 0.008058306855831972f;

// Weight levels of LANES rows x 4 columns, as `dot` takes them. VNNI multiplies unsigned by signed bytes, so there they
// have an offset of 128, which the initial value of the sum cancels; AVX2 multiplies magnitudes.
#if DSV2_AVX512
typedef __m512i Levels;
constexpr int LEVEL_OFFSET = 128;
#elif DSV2_AVX2
typedef __m256i Levels;
constexpr int LEVEL_OFFSET = 0;
#else
struct Levels {
    int8_t v[LANES * 4];
};
constexpr int LEVEL_OFFSET = 0;
#endif

inline Levels load_levels(const Levels* p) { return *p; }

// Unpack one octet (8 columns) of a panel of nf4: columns 0 to 3 to `low`, 4 to 7 to `high`.
inline void nf4_levels(const uint8_t* first, const uint8_t* second, Levels& low, Levels& high) {
#if DSV2_AVX512
    const __m512i table = _mm512_xor_si512(
        _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)NF4_CODES)), _mm512_set1_epi8(char(0x80)));
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i codes = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)first)), _mm256_loadu_si256((const __m256i*)second), 1);
    low = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, mask));
    high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask));
#elif DSV2_AVX2
    (void)second;
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)NF4_CODES));
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i codes = _mm256_loadu_si256((const __m256i*)first);
    low = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, mask));
    high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask));
#else
    (void)second;
    for (int i = 0; i < LANES * 4; i++) {
        low.v[i] = NF4_CODES[first[i] & 15];
        high.v[i] = NF4_CODES[first[i] >> 4];
    }
#endif
}

// Unpack one quad (4 columns) of a panel of int8.
inline Levels int8_levels(const uint8_t* first, const uint8_t* second) {
#if DSV2_AVX512
    const __m512i codes = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)first)), _mm256_loadu_si256((const __m256i*)second), 1);
    return _mm512_xor_si512(codes, _mm512_set1_epi8(char(0x80)));
#elif DSV2_AVX2
    (void)second;
    return _mm256_loadu_si256((const __m256i*)first);
#else
    (void)second;
    Levels levels;
    std::memcpy(levels.v, first, sizeof levels.v);
    return levels;
#endif
}

// sum + the products of 4 columns of levels with 4 activations, exactly.
inline Int dot(Int sum, Levels levels, const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
#if DSV2_AVX512
    return (Int)_mm512_dpbusd_epi32((__m512i)sum, levels, _mm512_set1_epi32(four));
#elif DSV2_AVX2
    const __m256i a = _mm256_set1_epi32(four);  // |level| and |activation| are at most 127: two products fit 16 bits
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(levels), _mm256_sign_epi8(a, levels));
    return (Int)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    for (int lane = 0; lane < LANES; lane++)
        for (int j = 0; j < 4; j++) sum[lane] += int32_t(levels.v[lane * 4 + j]) * activations[j];
    return sum;
#endif
}

}  // namespace dsv2
