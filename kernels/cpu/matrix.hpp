// Stored (quantised) matrices, quantised activations, and their product.
//
// Activations are quantised to int8 with one scale per 64 columns, so that a block of 64 columns is an exact integer
// sum. Block sums are added in fp32, in column order. So a token's result does not depend on how many tokens are
// computed at once, nor on the instruction set, up to the rounding of fused multiply-add.
#pragma once

#include <cstdlib>

#include <algorithm>
#include <new>

#include "simd.hpp"

namespace dsv2 {

enum Format : int32_t { NF4 = 0, INT8 = 1 };

// A matrix in the layout of `kernels/layout.py`. Python fills in this struct: `_Matrix` in `__init__.py` must match it.
struct Matrix {
    const uint8_t* codes;
    const uint16_t* scales;
    int64_t rows, cols;
    int32_t format;

    int64_t blocks() const { return (cols + BLOCK - 1) / BLOCK; }
    int64_t groups() const { return (rows + GROUP - 1) / GROUP; }
    int64_t tile_bytes() const { return format == NF4 ? GROUP * BLOCK / 2 : GROUP * BLOCK; }
    int64_t code_bytes() const { return groups() * blocks() * tile_bytes(); }
    int64_t nbytes() const { return code_bytes() + groups() * blocks() * GROUP * 2; }
    const uint8_t* group_codes(int64_t group) const { return codes + group * blocks() * tile_bytes(); }
    const uint16_t* group_scales(int64_t group) const { return scales + group * blocks() * GROUP; }

    // Dequantise one row to fp32; out[col * stride] is its column `col`.
    void dequantize_row(int64_t row, float* out, int64_t stride) const;
};

// A buffer that is reused by later calls (declare it thread_local); it grows but never shrinks.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    template <class T>
    T* reserve(int64_t count) {
        const size_t bytes = (size_t(count) * sizeof(T) + 127) / 64 * 64;
        if (bytes > size_) {
            std::free(data_);
            size_ = bytes;
            data_ = std::aligned_alloc(64, bytes);
            if (!data_) throw std::bad_alloc();
        }
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

// Activations as int8 with a scale per block of 64 columns. `starts` are the initial values of the blocks' integer
// sums, which cancel the offset and the bias of the weight levels. For products with weights of one format.
struct Activations {
    int8_t* codes;    // [rows, blocks * 64]
    float* scales;    // [rows, blocks], multiplied by the step of the weight levels
    int32_t* starts;  // [rows, blocks]
    int64_t blocks;
    Format format;

    Activations(Scratch& scratch, int64_t rows, int64_t cols, int32_t matrix_format)
        : blocks((cols + BLOCK - 1) / BLOCK), format(Format(matrix_format)) {
        codes = scratch.reserve<int8_t>(rows * blocks * (BLOCK + 8));
        scales = reinterpret_cast<float*>(codes + rows * blocks * BLOCK);
        starts = reinterpret_cast<int32_t*>(scales + rows * blocks);
    }

    // Quantise one row; the last block is padded with zeros.
    void quantize(int64_t row, const float* x, int64_t cols) {
        for (int64_t b = 0; b < blocks; b++) {
            if (cols - b * BLOCK >= BLOCK) {
                quantize_block(row, b, x + b * BLOCK);
            } else {
                float padded[BLOCK] = {};
                std::memcpy(padded, x + b * BLOCK, (cols - b * BLOCK) * sizeof(float));
                quantize_block(row, b, padded);
            }
        }
    }

    void quantize_block(int64_t row, int64_t b, const float* x) {
        typedef int8_t Char __attribute__((vector_size(LANES)));
        Vec largest{}, zero{};  // `zero` becomes NaN with a NaN or an infinity, which `maximum` may lose
        for (int i = 0; i < BLOCK; i += LANES) {
            largest = maximum(largest, absolute(load(x + i)));
            zero += load(x + i) * 0.0f;
        }
        const float scale = max_lane(largest) / 127.0f + sum(zero), inverse = scale > 1e-30f ? 1.0f / scale : 0.0f;
        Int total{};
        for (int i = 0; i < BLOCK; i += LANES) {
            const Int q = round_to_int(load(x + i) * inverse);
            const Char bytes = __builtin_convertvector(q, Char);
            std::memcpy(codes + (row * blocks + b) * BLOCK + i, &bytes, sizeof bytes);
            total += q;
        }
        int32_t count = 0;
        for (int i = 0; i < LANES; i++) count += total[i];
        const bool nf4 = format == NF4;
        scales[row * blocks + b] = nf4 ? scale * NF4_STEP : scale;
        starts[row * blocks + b] = -LEVEL_OFFSET * count - (nf4 ? int32_t(std::lrint(NF4_BIAS * float(count))) : 0);
    }
};

// The rows of `all` that a product takes: index[0..count), or the `count` rows from `first` on if `index` is null.
struct Selection {
    const Activations& all;
    int64_t count;
    int64_t first;
    const int32_t* index;

    int64_t row(int64_t i) const { return index ? index[i] : first + i; }
    Selection part(int64_t from, int64_t n) const {
        return {all, n, first + from, index ? index + from : nullptr};
    }
};

// Register tile of a product: TILE_TOKENS x TILE_PANELS integer sums and as many fp32 sums.
#if DSV2_AVX512
constexpr int TILE_TOKENS = 6, TILE_PANELS = 2;
#else
constexpr int TILE_TOKENS = 4, TILE_PANELS = 1;
#endif
// Tokens per pass over unpacked rows; their activations should fit in the L2 cache.
constexpr int64_t TOKEN_BLOCK = 256;

// Prefetch distances into L1 for the product of a single token: of nf4 codes in bytes, of scales in numbers. The
// hardware prefetcher stops at every memory page. For int8 it is enough, since twice as many code bytes are read per
// multiplication.
constexpr int64_t AHEAD = 1 << 12, SCALES_AHEAD = 1 << 8;

// LANES rows of a matrix: one or two groups of 8. If the matrix has no second group, it is the first again, and its
// lanes are unused.
template <int FORMAT>
struct Panel {
    const uint8_t *first, *second;
    const uint16_t *first_scales, *second_scales;

    Panel(const Matrix& m, int64_t group) {
        const int64_t other = std::min(group + PANEL_GROUPS - 1, m.groups() - 1);
        first = m.group_codes(group);
        second = m.group_codes(other);
        first_scales = m.group_scales(group);
        second_scales = m.group_scales(other);
    }

    static constexpr int64_t TILE = FORMAT == NF4 ? GROUP * BLOCK / 2 : GROUP * BLOCK;

    Vec scales(int64_t b) const { return load_scales(first_scales + b * GROUP, second_scales + b * GROUP); }

    // Call use(quad, levels) for the 16 quads of columns of block b.
    template <class Use>
    void levels(int64_t b, Use&& use) const {
        const uint8_t *p = first + b * TILE, *q = second + b * TILE;
        for (int i = 0; i < 8; i++) {
            if (FORMAT == NF4) {
                Levels low, high;
                nf4_levels(p + i * 32, q + i * 32, low, high);
                use(2 * i, low);
                use(2 * i + 1, high);
            } else {
                use(2 * i, int8_levels(p + i * 64, q + i * 64));
                use(2 * i + 1, int8_levels(p + i * 64 + 32, q + i * 64 + 32));
            }
        }
    }
};

#if DSV2_AVX512
// table[low nibble] for each byte; both 128-bit halves of `table` have the same 16 entries.
inline __m256i look_up(__m256i table, __m256i bytes) {
#if defined(__AVX512VBMI__)
    return _mm256_permutexvar_epi8(bytes, table);  // indexes with five bits; the fifth chooses between equal halves
#else
    return _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, _mm256_set1_epi8(15)));
#endif
}
#endif

// Product of a single token: every code is read once, in memory order, and multiplied in registers.
#if DSV2_AVX512
// Registers of 8 rows, half the full width: 8 rows x 4 columns are adjacent in memory, and the activations of 4 columns
// reach all rows by a broadcast that costs nothing.
template <int FORMAT>
inline __m256 stream_group(const uint8_t* p, const uint16_t* row_scales, const Activations& x, int64_t row) {
    constexpr int64_t TILE = Panel<FORMAT>::TILE;
    const int8_t* codes = x.codes + row * x.blocks * BLOCK;
    const float* scales = x.scales + row * x.blocks;
    const int32_t* starts = x.starts + row * x.blocks;
    const __m256i flip = _mm256_set1_epi8(char(0x80));
    const __m256i table = _mm256_xor_si256(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)NF4_CODES)), flip);
    __m256 total = _mm256_setzero_ps();
    for (int64_t b = 0; b < x.blocks; b++, p += TILE, codes += BLOCK) {
        __m256i sums[4] = {_mm256_set1_epi32(starts[b])};
        const auto add = [&](int quad, __m256i levels) {
            int32_t four;
            std::memcpy(&four, codes + quad * 4, 4);
            sums[quad % 4] = _mm256_dpbusd_epi32(sums[quad % 4], levels, _mm256_set1_epi32(four));
        };
        for (int i = 0; i < TILE / 32; i++) {
            const __m256i bytes = _mm256_loadu_si256((const __m256i*)(p + i * 32));
            if (FORMAT == NF4) {
                if (i % 2 == 0) __builtin_prefetch(p + AHEAD + i * 32);
                add(2 * i, look_up(table, bytes));
                add(2 * i + 1, look_up(table, _mm256_srli_epi16(bytes, 4)));
            } else {
                add(i, _mm256_xor_si256(bytes, flip));
            }
        }
        __builtin_prefetch(row_scales + b * GROUP + SCALES_AHEAD);
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3]));
        const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(row_scales + b * GROUP)));
        total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale, _mm256_set1_ps(scales[b])), total);
    }
    return total;
}

template <int FORMAT>
inline Vec stream(const Panel<FORMAT>& panel, const Activations& x, int64_t row) {
    const __m256 first = stream_group<FORMAT>(panel.first, panel.first_scales, x, row);
    if (panel.second == panel.first) return (Vec)_mm512_castps256_ps512(first);
    const __m256 second = stream_group<FORMAT>(panel.second, panel.second_scales, x, row);
    return (Vec)_mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
}
#else
template <int FORMAT>
inline Vec stream(const Panel<FORMAT>& panel, const Activations& x, int64_t row) {
    const int8_t* codes = x.codes + row * x.blocks * BLOCK;
    const float* scales = x.scales + row * x.blocks;
    const int32_t* starts = x.starts + row * x.blocks;
    Vec total{};
    for (int64_t b = 0; b < x.blocks; b++) {
        for (int64_t i = 0; FORMAT == NF4 && i < panel.TILE; i += 64)
            __builtin_prefetch(panel.first + b * panel.TILE + AHEAD + i);
        __builtin_prefetch(panel.first_scales + b * GROUP + SCALES_AHEAD);
        Int even = splat_int(starts[b]), odd{};  // two sums, so that an addition need not wait for the one before
        panel.levels(b, [&](int quad, Levels levels) {
            Int& sum = quad % 2 ? odd : even;
            sum = dot(sum, levels, codes + b * BLOCK + quad * 4);
        });
        total = fma(to_float(even + odd), panel.scales(b) * scales[b], total);
    }
    return total;
}
#endif

// Up to so many tokens are computed together from the codes as they are stored: unpacking a panel first takes longer
// than it saves.
constexpr int few_tokens(int format) { return DSV2_AVX512 && format == NF4 ? 8 : 4; }

template <int FORMAT, int TOKENS>
inline void stream_few(const Panel<FORMAT>& panel, const Selection& x, Vec (&out)[TOKENS]) {
    // Sums per token, so that additions need not wait for each other, as far as there are registers.
    constexpr int CHAINS = DSV2_AVX512 ? (TOKENS > 4 ? 1 : TOKENS > 2 ? 2 : 4) : (TOKENS > 2 ? 1 : 2);
    const int8_t* codes[TOKENS];
    int64_t rows[TOKENS];
    for (int t = 0; t < TOKENS; t++) {
        rows[t] = x.row(t) * x.all.blocks;
        codes[t] = x.all.codes + rows[t] * BLOCK;
        out[t] = Vec{};
    }
    for (int64_t b = 0; b < x.all.blocks; b++) {
        if (FORMAT == NF4)
            for (int64_t i = 0; i < panel.TILE; i += 64) {
                __builtin_prefetch(panel.first + b * panel.TILE + AHEAD + i);
                if (PANEL_GROUPS > 1) __builtin_prefetch(panel.second + b * panel.TILE + AHEAD + i);
            }
        __builtin_prefetch(panel.first_scales + b * GROUP + SCALES_AHEAD);
        Int sums[TOKENS][CHAINS] = {};
        for (int t = 0; t < TOKENS; t++) sums[t][0] = splat_int(x.all.starts[rows[t] + b]);
        panel.levels(b, [&](int quad, Levels levels) {
            for (int t = 0; t < TOKENS; t++) {
                Int& sum = sums[t][quad % CHAINS];
                sum = dot(sum, levels, codes[t] + b * BLOCK + quad * 4);
            }
        });
        const Vec scales = panel.scales(b);
        for (int t = 0; t < TOKENS; t++) {
            Int sum = sums[t][0];
            for (int chain = 1; chain < CHAINS; chain++) sum += sums[t][chain];
            out[t] = fma(to_float(sum), scales * x.all.scales[rows[t] + b], out[t]);
        }
    }
}

template <int FORMAT, int TOKENS, class Sink>
inline void multiply_few(const Panel<FORMAT>& panel, const Selection& x, int64_t row, Sink& sink) {
    if constexpr (TOKENS > 0) {
        if (x.count < TOKENS) return multiply_few<FORMAT, TOKENS - 1>(panel, x, row, sink);
        Vec out[TOKENS];
        stream_few<FORMAT, TOKENS>(panel, x, out);
        for (int t = 0; t < TOKENS; t++) sink(row, t, out[t]);
    }
}

// An unpacked panel, for products with several tokens.
struct Unpacked {
    const Levels* levels;  // [blocks, 16]
    const Vec* scales;     // [blocks]
};

// What is unpacked next, to be prefetched while the first tile is multiplied: bytes per block of columns.
struct Ahead {
    const uint8_t* codes;  // null: nothing
    int64_t code_bytes;
    const uint8_t* scales;
    int64_t scale_bytes;

    void prefetch(int64_t b) const {
        if (!codes) return;
        for (int64_t i = 0; i < code_bytes; i += 64) __builtin_prefetch(codes + b * code_bytes + i, 0, 2);
        __builtin_prefetch(scales + b * scale_bytes, 0, 2);
    }
};

template <int TOKENS, int PANELS>
inline void tile(const Unpacked (&panels)[PANELS], const Selection& x, int64_t from, const Ahead& ahead,
                 Vec (&out)[PANELS][TOKENS]) {
    const int64_t blocks = x.all.blocks;
    int64_t rows[TOKENS];
    for (int t = 0; t < TOKENS; t++) rows[t] = x.row(from + t) * blocks;
    for (int p = 0; p < PANELS; p++)
        for (int t = 0; t < TOKENS; t++) out[p][t] = Vec{};
    for (int64_t b = 0; b < blocks; b++) {
        ahead.prefetch(b);
        Int sums[PANELS][TOKENS];
        for (int t = 0; t < TOKENS; t++)
            for (int p = 0; p < PANELS; p++) sums[p][t] = splat_int(x.all.starts[rows[t] + b]);
        for (int quad = 0; quad < 16; quad++) {
            Levels levels[PANELS];
            for (int p = 0; p < PANELS; p++) levels[p] = load_levels(panels[p].levels + b * 16 + quad);
            for (int t = 0; t < TOKENS; t++)
                for (int p = 0; p < PANELS; p++)
                    sums[p][t] = dot(sums[p][t], levels[p], x.all.codes + (rows[t] + b) * BLOCK + quad * 4);
        }
        for (int p = 0; p < PANELS; p++) {
            const Vec scales = panels[p].scales[b];
            for (int t = 0; t < TOKENS; t++)
                out[p][t] = fma(to_float(sums[p][t]), scales * x.all.scales[rows[t] + b], out[p][t]);
        }
    }
}

// Products of the tokens from `from` on: full tiles first, then ever smaller ones for the rest.
template <int TOKENS, int PANELS, class Sink>
inline void tiles(const Unpacked (&panels)[PANELS], const Selection& x, int64_t from, int64_t row, Ahead ahead, Sink& sink) {
    if constexpr (TOKENS > 0) {
        for (; x.count - from >= TOKENS; from += TOKENS) {
            Vec out[PANELS][TOKENS];
            tile<TOKENS, PANELS>(panels, x, from, ahead, out);
            ahead.codes = nullptr;
            for (int p = 0; p < PANELS; p++)
                for (int t = 0; t < TOKENS; t++) sink(row + p * LANES, from + t, out[p][t]);
        }
        tiles<TOKENS - 1, PANELS>(panels, x, from, row, ahead, sink);
    }
}

template <int FORMAT, int PANELS, class Sink>
inline void multiply_panels(const Matrix& m, int64_t group, const Selection& x, Sink& sink) {
    thread_local Scratch scratch;
    const int64_t blocks = m.blocks();
    Levels* levels = scratch.reserve<Levels>(PANELS * blocks * 17);
    Unpacked panels[PANELS];
    for (int p = 0; p < PANELS; p++) {
        const Panel<FORMAT> panel(m, group + p * PANEL_GROUPS);
        Levels* unpacked = levels + p * blocks * 16;
        Vec* scales = reinterpret_cast<Vec*>(levels + PANELS * blocks * 16) + p * blocks;
        for (int64_t b = 0; b < blocks; b++) {
            panel.levels(b, [&](int quad, Levels value) { unpacked[b * 16 + quad] = value; });
            scales[b] = panel.scales(b);
        }
        panels[p] = {unpacked, scales};
    }
    // The groups of rows that follow are next in memory; it does no harm if there are none.
    const int64_t next = group + PANELS * PANEL_GROUPS, scale_bytes = PANELS * PANEL_GROUPS * GROUP * 2;
    const Ahead ahead{m.group_codes(next), PANELS * PANEL_GROUPS * Panel<FORMAT>::TILE,
                      reinterpret_cast<const uint8_t*>(m.group_scales(next)), scale_bytes};
    tiles<TILE_TOKENS, PANELS>(panels, x, 0, group * GROUP, ahead, sink);
}

template <int FORMAT, class Sink>
inline void multiply_format(const Matrix& m, int64_t group, int64_t end, const Selection& x, Sink& sink) {
    if (x.count == 1) {
        const int64_t row = x.row(0);
        for (; group < end; group += PANEL_GROUPS)
            sink(group * GROUP, 0, stream(Panel<FORMAT>(m, group), x.all, row));
        return;
    }
    constexpr int FEW = few_tokens(FORMAT);
    if (x.count <= FEW) {
        for (; group < end; group += PANEL_GROUPS)
            multiply_few<FORMAT, FEW>(Panel<FORMAT>(m, group), x, group * GROUP, sink);
        return;
    }
    for (; end - group >= TILE_PANELS * PANEL_GROUPS; group += TILE_PANELS * PANEL_GROUPS)
        multiply_panels<FORMAT, TILE_PANELS>(m, group, x, sink);
    for (; group < end; group += PANEL_GROUPS) multiply_panels<FORMAT, 1>(m, group, x, sink);
}

// Rows [group * 8, end * 8) of m times the selected activations. Calls sink(row, i, value) with rows [row, row + LANES)
// of the result of the i-th selected row; lanes past the end of the range must be ignored.
template <class Sink>
inline void multiply(const Matrix& m, int64_t group, int64_t end, const Selection& x, Sink&& sink) {
    if (m.format == NF4) multiply_format<NF4>(m, group, end, x, sink);
    else multiply_format<INT8>(m, group, end, x, sink);
}

// Load or store the first `count` lanes, all of them if `count` is larger.
inline Vec load_lanes(const float* p, int64_t count) {
    if (count >= LANES) return load(p);
    float lanes[LANES] = {};
    std::memcpy(lanes, p, std::max<int64_t>(count, 0) * sizeof(float));
    return load(lanes);
}
inline void store_lanes(float* p, Vec v, int64_t count) {
    if (count >= LANES) store(p, v);
    else std::memcpy(p, &v, std::max<int64_t>(count, 0) * sizeof(float));
}

// y [tokens, rows] = x · mᵀ, where x is [tokens, heads, cols] and the rows of m are divided among the heads, in whole
// groups of 8.
void heads_linear(const float* x, int64_t tokens, int64_t heads, const Matrix& m, float* y);

}  // namespace dsv2
