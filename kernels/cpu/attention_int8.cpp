// Absorbed attention over 8-bit latents. Lanes are rows of queries, so that scores and their softmax need no sum across
// lanes, and a block of 64 columns is an exact sum of integers.
//
// Scores: the query is quantised too, with one scale per row and block: to 8 bits where VNNI multiplies bytes (0.6 % of its
// norm), else to 16 (nothing). Sums: a position's weight times its scale of the block, to 15 bits of the largest there can
// be (0.02 %). The rope key is bf16 and meets the query as it does in a bf16 cache.
#include "attention.hpp"

#include "rows.hpp"

namespace dsv2 {
namespace {

constexpr int ROWS = 16, VECS = ROWS / LANES;  // rows of queries that share a pass over the cache
constexpr int TILE = DSV2_AVX512 ? 8 : 4;      // positions whose scores are made at a time
constexpr int MIXED = DSV2_AVX512 ? 8 : 4;     // rows whose sums are made at a time, two registers of columns each
constexpr int PAIR = STEP / LANES;             // numbers of a rope key that meet a lane in one instruction
// Columns that lie together, position after position, so that sums find them in the first cache; and positions of a strip,
// two more than there can be, so that strips do not fall on the same lines of the caches.
constexpr int64_t STRIP = 2 * LANES, STRIP_ROWS = CHUNK + 2;
constexpr float WEIGHT_LEVELS = 32767;

// Codes of a latent, and of a query, as the product of scores takes them: QUAD numbers in a lane.
#if DSV2_AVX512
typedef uint8_t Code;
typedef int8_t QueryCode;
constexpr int QUAD = 4, OFFSET = 128;  // VNNI multiplies unsigned bytes: latents are kept with an offset
constexpr float QUERY_LEVELS = 127;
#else
typedef int16_t Code, QueryCode;
constexpr int QUAD = 2, OFFSET = 0;
constexpr float QUERY_LEVELS = 32767;
#endif

inline Int load_int(const void* p) {
    Int v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store_int(void* p, Int v) { std::memcpy(p, &v, sizeof v); }

// The same 32 bits in every lane.
inline Int spread(const void* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return splat_int(word);
}
#if DSV2_BF16
inline Packed spread_key(const Query* p) { return (Packed)(__m512i)spread(p); }
#else
inline Packed spread_key(const Query* p) { return splat(*p); }
#endif

// sum + a · b, of two 16-bit numbers in each lane.
inline Int add_pairs(Int sum, Int a, Int b) {
#if DSV2_AVX512
    return (Int)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif DSV2_AVX2
    return (Int)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// sum + latents · queries, of QUAD codes in each lane.
inline Int add_quads(Int sum, Int latents, Int queries) {
#if DSV2_AVX512
    return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)latents, (__m512i)queries);
#else
    return add_pairs(sum, latents, queries);
#endif
}

// Codes of two positions, a strip of each, as pairs of 16 bits in two registers, in the order that `in_order` ends.
inline void interleave(const Code* a, const Code* b, Int (&pairs)[2]) {
#if DSV2_AVX512
    const auto widen = [](const Code* p) {
        const __m256i signs = _mm256_set1_epi8(char(OFFSET));
        return _mm512_cvtepi8_epi16(_mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), signs));
    };
    const __m512i first = widen(a), second = widen(b);
    pairs[0] = (Int)_mm512_unpacklo_epi16(first, second);
    pairs[1] = (Int)_mm512_unpackhi_epi16(first, second);
#elif DSV2_AVX2
    const __m256i first = _mm256_loadu_si256((const __m256i*)a), second = _mm256_loadu_si256((const __m256i*)b);
    pairs[0] = (Int)_mm256_unpacklo_epi16(first, second);
    pairs[1] = (Int)_mm256_unpackhi_epi16(first, second);
#else
    for (int v = 0; v < 2; v++)
        for (int lane = 0; lane < LANES; lane++)
            pairs[v][lane] = uint16_t(a[v * LANES + lane]) | int32_t(uint32_t(uint16_t(b[v * LANES + lane])) << 16);
#endif
}

// ROWS rows of queries; `blocks` and `rope` numbers each.
struct Queries {
    QueryCode* codes;  // [block, BLOCK / QUAD, ROWS, QUAD]
    float* scales;     // [block, ROWS]
    int32_t* starts;   // [block, ROWS]: where a sum begins, so that the offset of the latents cancels
    Query* rope;       // [P / PAIR, ROWS, PAIR]

    void put_block(int64_t row, int64_t b, const float* x, int64_t count) {
        float largest = 0;
        for (int64_t i = 0; i < count; i++) largest = std::max(largest, std::fabs(x[i]));
        const float scale = largest / QUERY_LEVELS, inverse = scale > 1e-30f ? 1.0f / scale : 0.0f;
        int32_t total = 0;
        for (int64_t i = 0; i < BLOCK; i++) {
            const int32_t code = i < count ? int32_t(std::nearbyint(x[i] * inverse)) : 0;
            codes[((b * BLOCK + i) / QUAD * ROWS + row) * QUAD + i % QUAD] = QueryCode(code);
            total += code;
        }
        scales[b * ROWS + row] = scale;
        starts[b * ROWS + row] = -OFFSET * total;
    }
    void put_rope(int64_t row, const float* x, int64_t P) {
        for (int64_t d = 0; d < P; d++) rope[(d / PAIR * ROWS + row) * PAIR + d % PAIR] = to_query(x[d]);
    }
};

// A chunk of the cache, ready to be multiplied.
struct Chunk {
    int64_t n, blocks, P;
    Code* codes;    // [blocks, BLOCK / STRIP, STRIP_ROWS, STRIP], zero past the latent
    float* scales;  // [CHUNK, blocks]
    Query* keys;    // [CHUNK, P]

    Chunk(Scratch& scratch, const Latents& latents, int64_t from, int64_t count)
        : n(count), blocks(latents.blocks()), P(latents.P) {
        const int64_t count_codes = STRIP_ROWS * blocks * BLOCK, floats = CHUNK * blocks;
        const int64_t bytes = count_codes * int64_t(sizeof(Code)) + floats * 4 + CHUNK * P * int64_t(sizeof(Query));
        codes = reinterpret_cast<Code*>(scratch.reserve<uint8_t>(bytes));
        scales = reinterpret_cast<float*>(codes + count_codes);
        keys = reinterpret_cast<Query*>(scales + floats);
        for (int64_t s = 0; s < n; s++) {
            const uint8_t *row = latents.row(from + s), *key = latents.rope_key(from + s);
            for (int64_t c = 0; c < blocks * BLOCK; c += STRIP) widen(row + c, latents.C - c, codes + place(s, c));
            for (int64_t b = 0; b < blocks; b++) scales[s * blocks + b] = latents.scale(from + s, b);
            put_key(key, keys + s * P);
        }
        for (int64_t c = 0; n % 2 && c < blocks * BLOCK; c += STRIP) widen(nullptr, 0, codes + place(n, c));  // a partner of weight 0
    }

    static int64_t place(int64_t s, int64_t c) { return (c / STRIP * STRIP_ROWS + s) * STRIP + c % STRIP; }

  private:
    void put_key(const uint8_t* key, Query* to) const {
#if DSV2_BF16
        std::memcpy(to, key, P * sizeof *to);
#else
        int64_t d = 0;
        for (; d + LANES <= P; d += LANES) store(to + d, load_bf16(reinterpret_cast<const uint16_t*>(key) + d));
        for (; d < P; d++) to[d] = load_half(key + 2 * d);
#endif
    }
    // The first `count` codes of a strip, and zeros.
    static void widen(const uint8_t* from, int64_t count, Code* to) {
        int8_t narrow[STRIP] = {};  // a copy, which cannot overlap with `to`
        if (count >= STRIP) std::memcpy(narrow, from, STRIP);
        else if (count > 0) std::memcpy(narrow, from, count);
        for (int64_t i = 0; i < STRIP; i++) to[i] = Code(narrow[i] + OFFSET);
    }
};

// scores[s][row] = queries[row] · latents[s].
void score(const Queries& q, const Chunk& chunk, float (*scores)[ROWS]) {
    for (int64_t s = 0; s < chunk.n; s += TILE) {
        int64_t at[TILE];
        const Code* rows[TILE];
        for (int t = 0; t < TILE; t++) {
            at[t] = std::min(s + t, chunk.n - 1);
            rows[t] = chunk.codes + chunk.place(at[t], 0);
        }
        Vec totals[TILE][VECS] = {};
        for (int64_t b = 0; b < chunk.blocks; b++) {
            Int sums[TILE][VECS];
            for (int t = 0; t < TILE; t++)
                for (int v = 0; v < VECS; v++) sums[t][v] = load_int(q.starts + b * ROWS + v * LANES);
            for (int64_t c = b * BLOCK; c < (b + 1) * BLOCK; c += QUAD) {
                Int queries[VECS];
                for (int v = 0; v < VECS; v++) queries[v] = load_int(q.codes + c * ROWS + v * LANES * QUAD);
                const int64_t place = chunk.place(0, c);
                for (int t = 0; t < TILE; t++) {
                    const Int latent = spread(rows[t] + place);
                    for (int v = 0; v < VECS; v++) sums[t][v] = add_quads(sums[t][v], latent, queries[v]);
                }
            }
            for (int v = 0; v < VECS; v++) {
                const Vec scales = load(q.scales + b * ROWS + v * LANES);
                for (int t = 0; t < TILE; t++) {
                    const Vec both = scales * chunk.scales[at[t] * chunk.blocks + b];
                    totals[t][v] = fma(to_float(sums[t][v]), both, totals[t][v]);
                }
            }
        }
        for (int64_t d = 0; d < chunk.P; d += PAIR)
            for (int t = 0; t < TILE; t++) {
                const Packed key = spread_key(chunk.keys + at[t] * chunk.P + d);
                for (int v = 0; v < VECS; v++)
                    totals[t][v] = dot_add(totals[t][v], load_query(q.rope + d * ROWS + v * LANES * PAIR), key);
            }
        for (int t = 0; t < TILE && s + t < chunk.n; t++)
            for (int v = 0; v < VECS; v++) store(scores[s + t] + v * LANES, totals[t][v]);
    }
}

// What a step of a row's weights is in block b, so that the largest there can be is WEIGHT_LEVELS: from the positions that
// the row sees alone, since its result must not depend on which other rows there are.
void find_units(const Chunk& chunk, int64_t b, const int32_t* limits, float* units) {
    for (int row = 0; row < ROWS; row++) {
        if (row && limits[row] == limits[row - 1]) {
            units[row] = units[row - 1];
            continue;
        }
        float largest = 0;
        for (int64_t s = 0; s < limits[row]; s++) largest = std::max(largest, chunk.scales[s * chunk.blocks + b]);
        units[row] = largest / WEIGHT_LEVELS;
    }
}

// A block's weights as pairs of 16-bit numbers: weights[s / 2][row] of p[s][row] · scales[s] / units[row].
void pack_weights(const float (*p)[ROWS], const Chunk& chunk, int64_t b, const float* units, int32_t (*weights)[ROWS]) {
    for (int at = 0; at < ROWS; at += LANES) {
        const Vec unit = load(units + at), inverse = unit > 0.0f ? 1.0f / unit : Vec{};
        for (int64_t s = 0; s < chunk.n; s += 2) {
            const int64_t next = std::min(s + 1, chunk.n - 1);
            const Vec first = inverse * chunk.scales[s * chunk.blocks + b], second = inverse * chunk.scales[next * chunk.blocks + b];
            const Int low = round_to_int(load(p[s] + at) * first), high = round_to_int(load(p[s + 1] + at) * second);
            store_int(weights[s / 2] + at, low | high << 16);
        }
    }
}

// out[row][c] = Σ_s p[s][row] · latents[s][c].
void mix(const float (*p)[ROWS], const Chunk& chunk, const int32_t* limits, float* out) {
    alignas(64) int32_t weights[CHUNK / 2][ROWS];
    alignas(64) float units[ROWS];
    const int64_t width = chunk.blocks * BLOCK;
    for (int64_t b = 0; b < chunk.blocks; b++) {
        find_units(chunk, b, limits, units);
        pack_weights(p, chunk, b, units, weights);
        for (int64_t c = b * BLOCK; c < (b + 1) * BLOCK; c += STRIP) {
            const Code* strip = chunk.codes + chunk.place(0, c);
            for (int row = 0; row < ROWS; row += MIXED) {
                Int sums[MIXED][2] = {};
                for (int64_t s = 0; s < chunk.n; s += 2) {
                    Int pairs[2];
                    interleave(strip + s * STRIP, strip + (s + 1) * STRIP, pairs);
                    for (int r = 0; r < MIXED; r++) {
                        const Int weight = spread(&weights[s / 2][row + r]);
                        for (int v = 0; v < 2; v++) sums[r][v] = add_pairs(sums[r][v], weight, pairs[v]);
                    }
                }
                for (int r = 0; r < MIXED; r++) {
                    Vec columns[2] = {to_float(sums[r][0]), to_float(sums[r][1])};
                    in_order(columns);
                    for (int v = 0; v < 2; v++) store(out + (row + r) * width + c + v * LANES, columns[v] * units[row + r]);
                }
            }
        }
    }
}

}  // namespace

void absorbed_int8(const Shape& shape, const float* latent, const float* rope, float scale, const Latents& latents,
                   float* mixed) {
    const int64_t rows = shape.rows(), C = shape.C, P = shape.P, blocks = latents.blocks();
    const int64_t passes = (rows + ROWS - 1) / ROWS, width = blocks * BLOCK;
    const int64_t code_bytes = ROWS * width * int64_t(sizeof(QueryCode)), rope_bytes = round_up(ROWS * P * int64_t(sizeof(Query)), 64);
    const int64_t pass_bytes = code_bytes + 2 * blocks * ROWS * 4 + rope_bytes;
    thread_local Scratch query_scratch;
    uint8_t* storage = query_scratch.reserve<uint8_t>(passes * pass_bytes);
    std::memset(storage, 0, passes * pass_bytes);  // rows that fill up the last pass
    const auto queries_of = [&](int64_t pass) {
        uint8_t* at = storage + pass * pass_bytes;
        float* scales = reinterpret_cast<float*>(at + code_bytes);
        int32_t* starts = reinterpret_cast<int32_t*>(scales + blocks * ROWS);
        return Queries{reinterpret_cast<QueryCode*>(at), scales, starts, reinterpret_cast<Query*>(starts + blocks * ROWS)};
    };
    each_row(rows, [&](int64_t row) {
        Queries queries = queries_of(row / ROWS);
        for (int64_t b = 0; b < blocks; b++) {
            float scaled[BLOCK];
            const int64_t count = std::min<int64_t>(BLOCK, C - b * BLOCK);
            for (int64_t i = 0; i < count; i++) scaled[i] = latent[row * C + b * BLOCK + i] * scale;
            queries.put_block(row % ROWS, b, scaled, count);
        }
        queries.put_rope(row % ROWS, rope + row * P, P);
    });
    absorbed<ROWS>(shape, width, mixed, [&](int64_t pass, int64_t end, int64_t s, int64_t n, float* out, Part<ROWS>* parts) {
        thread_local Scratch scratch;
        alignas(64) float weights[CHUNK][ROWS];
        const Chunk chunk(scratch, latents, s, n);
        for (; pass < end; pass++, out += ROWS * width, parts++) {
            int32_t limits[ROWS];
            find_limits(shape, pass, s, n, limits);
            score(queries_of(pass), chunk, weights);
            soften(weights, n, limits, *parts);
            if (n % 2) std::memset(weights[n], 0, sizeof *weights);  // of a partner
            mix(weights, chunk, limits, out);
        }
    });
}

}  // namespace dsv2
