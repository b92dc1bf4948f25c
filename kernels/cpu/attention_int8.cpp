// Absorbed attention over 8-bit latents. Lanes are query rows, so that scores and softmax need no sum across lanes. A
// block here is 64 columns of a latent, which share a scale; its products are added as integers, exactly.
//
// Scores: the query is quantised too, with one scale per row and block: to 8 bits where VNNI multiplies bytes (an error
// of 0.6 % of its norm), else to 16 bits (negligible). Sums: the softmax weight of a position times its scale is
// rounded to 15 bits, relative to the largest possible product (0.02 %). The rope key is bf16 and is multiplied as in a
// bf16 cache.
#include "attention.hpp"

#include "rows.hpp"

namespace dsv2 {
namespace {

constexpr int ROWS = 16, VECS = ROWS / LANES;  // query rows that share a pass over the cache
constexpr int TILE = DSV2_AVX512 ? 8 : 4;      // positions whose scores are computed at a time
constexpr int BATCH = 16;                      // positions whose codes are unpacked at a time
constexpr int MIXED = DSV2_AVX512 ? 8 : 4;     // rows whose sums are computed at a time, two registers of columns each
constexpr int PAIR = STEP / LANES;             // numbers of a rope key per lane and instruction
constexpr int STRIP = 2 * LANES, STRIPS = BLOCK / STRIP;  // columns whose sums are computed at a time
constexpr int64_t SPAN = 128;                  // positions whose block of columns fits in the L1 cache
constexpr float WEIGHT_LEVELS = 32767;

// Code types of latents and queries in the product that gives the scores: QUAD codes per lane.
#if DSV2_AVX512
typedef uint8_t Code;
typedef int8_t QueryCode;
constexpr int QUAD = 4, OFFSET = 128;  // VNNI multiplies unsigned by signed bytes, so latent codes get an offset
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

// The 32 bits at p, in every lane.
inline Int broadcast(const void* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return splat_int(word);
}
#if DSV2_BF16
inline Packed broadcast_key(const Query* p) { return (Packed)(__m512i)broadcast(p); }
#else
inline Packed broadcast_key(const Query* p) { return splat(*p); }
#endif

// sum + a · b, with two 16-bit numbers per lane.
inline Int add_pairs(Int sum, Int a, Int b) {
#if DSV2_AVX512
    return (Int)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif DSV2_AVX2
    return (Int)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// sum + latents · queries, with QUAD codes per lane.
inline Int add_quads(Int sum, Int latents, Int queries) {
#if DSV2_AVX512
    return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)latents, (__m512i)queries);
#else
    return add_pairs(sum, latents, queries);
#endif
}

// Interleave 16 codes of position a with those of position b, widened to 16 bits: one pair per column.
inline void store_pairs(const uint8_t* a, const uint8_t* b, int32_t* to) {
#if DSV2_AVX512 || DSV2_AVX2
    const __m128i first = _mm_loadu_si128((const __m128i*)a), second = _mm_loadu_si128((const __m128i*)b);
    _mm256_storeu_si256((__m256i*)to, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(first, second)));
    _mm256_storeu_si256((__m256i*)(to + 8), _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(first, second)));
#else
    for (int i = 0; i < 16; i++) to[i] = uint16_t(int8_t(a[i])) | int32_t(uint32_t(int8_t(b[i])) << 16);
#endif
}

// ROWS query rows, quantised.
struct Queries {
    QueryCode* codes;  // [block, BLOCK / QUAD, ROWS, QUAD]
    float* scales;     // [block, ROWS]
    int32_t* starts;   // [block, ROWS]: initial values of the integer sums, which cancel the offset of the latents
    Query* rope;       // [P / PAIR, ROWS, PAIR]

    void put_block(int64_t row, int64_t b, const float* x, int64_t count) {
        float largest = 0, zero = 0;  // `zero` becomes NaN with a NaN or an infinity
        for (int64_t i = 0; i < count; i++) largest = std::max(largest, std::fabs(x[i])), zero += x[i] * 0.0f;
        const float scale = largest / QUERY_LEVELS + zero, inverse = scale > 1e-30f ? 1.0f / scale : 0.0f;
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

// A batch of positions, unpacked for the product with queries.
struct Batch {
    int64_t width, P;  // columns of whole blocks, numbers of the rope key
    Code* codes;       // [BATCH, width], zeros past the latent
    Query* keys;       // [BATCH, P]

    Batch(Scratch& scratch, const Latents& latents) : width(latents.scale_blocks() * BLOCK), P(latents.P) {
        codes = scratch.reserve<Code>(BATCH * width + BATCH * P * int64_t(sizeof(Query) / sizeof(Code)));
        keys = reinterpret_cast<Query*>(codes + BATCH * width);
    }
    void put(const Latents& latents, const uint8_t* row, int64_t t) {
        const int64_t whole = latents.C / STRIP * STRIP;
        Code* to = codes + t * width;
        for (int64_t c = 0; c < whole; c += STRIP) widen(row + c, to + c);
        if (whole < width) {
            uint8_t tail[BLOCK + STRIP] = {};
            std::memcpy(tail, row + whole, latents.C - whole);
            for (int64_t c = whole; c < width; c += STRIP) widen(tail + c - whole, to + c);
        }
        put_key(row + latents.rope_at(), keys + t * P);
    }

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
    static void widen(const uint8_t* from, Code* to) {
        int8_t narrow[STRIP];  // a copy, which the compiler knows not to overlap with `to`
        std::memcpy(narrow, from, STRIP);
        for (int i = 0; i < STRIP; i++) to[i] = Code(narrow[i] + OFFSET);
    }
};

// scores[t][row] = queries[row] · batch[first + t] for a tile of positions; scales [TILE, stride] of their blocks.
void score(const Queries& q, const Batch& batch, int64_t first, const float* scales, int64_t stride, float (*scores)[ROWS]) {
    const int64_t blocks = batch.width / BLOCK;
    const Code* codes = batch.codes + first * batch.width;
    const Query* keys = batch.keys + first * batch.P;
    Vec totals[TILE][VECS] = {};
    for (int64_t b = 0; b < blocks; b++) {
        Int sums[TILE][VECS];
        for (int t = 0; t < TILE; t++)
            for (int v = 0; v < VECS; v++) sums[t][v] = load_int(q.starts + b * ROWS + v * LANES);
        for (int64_t c = b * BLOCK; c < (b + 1) * BLOCK; c += QUAD) {
            Int queries[VECS];
            for (int v = 0; v < VECS; v++) queries[v] = load_int(q.codes + c * ROWS + v * LANES * QUAD);
            for (int t = 0; t < TILE; t++) {
                const Int latent = broadcast(codes + t * batch.width + c);
                for (int v = 0; v < VECS; v++) sums[t][v] = add_quads(sums[t][v], latent, queries[v]);
            }
        }
        for (int v = 0; v < VECS; v++) {
            const Vec query_scales = load(q.scales + b * ROWS + v * LANES);
            for (int t = 0; t < TILE; t++)
                totals[t][v] = fma(to_float(sums[t][v]), query_scales * scales[t * stride + b], totals[t][v]);
        }
    }
    for (int64_t d = 0; d < batch.P; d += PAIR)
        for (int t = 0; t < TILE; t++) {
            const Packed key = broadcast_key(keys + t * batch.P + d);
            for (int v = 0; v < VECS; v++)
                totals[t][v] = dot_add(totals[t][v], load_query(q.rope + d * ROWS + v * LANES * PAIR), key);
        }
    for (int t = 0; t < TILE; t++)
        for (int v = 0; v < VECS; v++) store(scores[t] + v * LANES, totals[t][v]);
}

// units[block][row]: the step of a row's quantised weights in each block, so that the largest possible weight is
// WEIGHT_LEVELS steps. Only positions that the row attends to count: its result must not depend on the other rows.
void find_units(const float* scales, int64_t stride, const int32_t* limits, float (*units)[ROWS]) {
    for (int row = 0; row < ROWS; row++)
        for (int64_t b = 0; b < stride; b += LANES) {
            Vec largest{};
            const bool known = row && limits[row] == limits[row - 1];
            for (int64_t s = 0; s < limits[row] && !known; s++) largest = maximum(load(scales + s * stride + b), largest);
            for (int i = 0; i < LANES; i++) units[b + i][row] = known ? units[b + i][row - 1] : largest[i] / WEIGHT_LEVELS;
        }
}

// Quantised weights of a block as pairs of 16-bit numbers: weights[s / 2][row] = p[s][row] · scales[s] / units[row].
void pack_weights(const float (*p)[ROWS], const float* scales, int64_t stride, int64_t n, const float* units,
                  int32_t (*weights)[ROWS]) {
    for (int at = 0; at < ROWS; at += LANES) {
        const Vec unit = load(units + at), inverse = unit > 0.0f ? 1.0f / unit : Vec{};
        for (int64_t s = 0; s < n; s += 2) {
            const int64_t next = std::min(s + 1, n - 1);
            const Vec first = inverse * scales[s * stride], second = inverse * scales[next * stride];
            const Int low = round_to_int(load(p[s] + at) * first), high = round_to_int(load(p[s + 1] + at) * second);
            store_int(weights[s / 2] + at, low | high << 16);
        }
    }
}

// The columns of block b of n positions as pairs of positions: pairs[strip][s / 2][column], zeros past the latent.
void interleave(const Latents& latents, const uint8_t* const* rows, int64_t n, int64_t b, int32_t (*pairs)[SPAN / 2][STRIP]) {
    const int64_t columns = std::min<int64_t>(BLOCK, latents.C - b * BLOCK);
    uint8_t copies[2][BLOCK] = {};
    for (int64_t s = 0; s < n; s += 2) {
        const uint8_t* both[2] = {rows[s] + b * BLOCK, rows[std::min(s + 1, n - 1)] + b * BLOCK};
        for (int i = 0; i < 2 && columns < BLOCK; i++) {
            std::memcpy(copies[i], both[i], columns);
            both[i] = copies[i];
        }
        __builtin_prefetch(both[0] + BLOCK);
        __builtin_prefetch(both[1] + BLOCK);
        for (int c = 0; c < BLOCK; c += 16) store_pairs(both[0] + c, both[1] + c, pairs[c / STRIP][s / 2] + c % STRIP);
    }
}

// out[row][c] += units[row] · Σ_s weights[s][row] · pairs[s][c] for one strip of columns and `count` pairs of
// positions.
void mix(const int32_t (*weights)[ROWS], const int32_t (*pairs)[STRIP], int64_t count, const float* units, float* out,
         int64_t width) {
    for (int row = 0; row < ROWS; row += MIXED) {
        Int sums[MIXED][2] = {};
        for (int64_t s = 0; s < count; s++) {
            const Int columns[2] = {load_int(pairs[s]), load_int(pairs[s] + LANES)};
            for (int r = 0; r < MIXED; r++) {
                const Int weight = broadcast(&weights[s][row + r]);
                for (int v = 0; v < 2; v++) sums[r][v] = add_pairs(sums[r][v], weight, columns[v]);
            }
        }
        for (int r = 0; r < MIXED; r++)
            for (int v = 0; v < 2; v++) {
                float* to = out + (row + r) * width + v * LANES;
                store(to, fma(to_float(sums[r][v]), splat(units[row + r]), load(to)));
            }
    }
}

// Working memory of one thread: a chunk of the cache, and the passes of query rows over it.
struct Work {
    const uint8_t* rows[CHUNK];  // cache rows; past the end of the chunk its last row again
    alignas(64) float weights[TOGETHER][CHUNK][ROWS];
    alignas(64) int32_t packed[TOGETHER][CHUNK / 2][ROWS], pairs[STRIPS][SPAN / 2][STRIP], limits[TOGETHER][ROWS];
};

// The scores of `count` passes into work.weights, and the chunk's scales [CHUNK, stride]. The next batch is prefetched
// while one is multiplied.
template <class QueriesOf>
void score_chunk(const Latents& latents, int64_t n, int64_t count, const QueriesOf& queries_of, float* scales, int64_t stride,
                 Work& work) {
    thread_local Scratch scratch;
    Batch batch(scratch, latents);
    for (int64_t s = 0; s < n; s += BATCH) {
        for (int64_t t = s; t < s + BATCH; t++) {
            batch.put(latents, work.rows[t], t - s);
            for (int64_t b = 0; b < stride; b++)
                scales[t * stride + b] = b < latents.scale_blocks() ? load_half(work.rows[t] + latents.C + 2 * b) : 0;
        }
        for (int64_t i = 0; i < count; i++)
            for (int64_t t = 0; t < BATCH; t += TILE) {
                for (int64_t ahead = s + BATCH + t; i == 0 && ahead < std::min(s + BATCH + t + TILE, n); ahead++)
                    for (int64_t at = 0; at < latents.row_bytes(); at += 64) __builtin_prefetch(work.rows[ahead] + at);
                score(queries_of(i), batch, t, scales + (s + t) * stride, stride, work.weights[i] + s + t);
            }
    }
}

// out[pass][row] += the weighted sums of latents, for `count` passes.
void mix_chunk(const Latents& latents, int64_t n, int64_t count, const float* scales, int64_t stride, Work& work, float* out) {
    thread_local Scratch scratch;
    const int64_t blocks = latents.scale_blocks(), width = blocks * BLOCK;
    float(*units)[ROWS] = reinterpret_cast<float(*)[ROWS]>(scratch.reserve<float>(count * stride * ROWS));
    for (int64_t i = 0; i < count; i++) find_units(scales, stride, work.limits[i], units + i * stride);
    for (int64_t b = 0; b < blocks; b++) {
        for (int64_t i = 0; i < count; i++)
            pack_weights(work.weights[i], scales + b, stride, n, units[i * stride + b], work.packed[i]);
        for (int64_t s = 0; s < n; s += SPAN) {
            const int64_t some = std::min(SPAN, n - s);
            interleave(latents, work.rows + s, some, b, work.pairs);
            for (int64_t i = 0; i < count; i++)
                for (int strip = 0; strip < STRIPS; strip++)
                    mix(work.packed[i] + s / 2, work.pairs[strip], (some + 1) / 2, units[i * stride + b],
                        out + i * ROWS * width + b * BLOCK + strip * STRIP, width);
        }
    }
}

}  // namespace

void absorbed_int8(const Shape& shape, const std::vector<Tokens>& sequences, const float* latent, const float* rope,
                   float scale, float* mixed) {
    const QueryRows<ROWS> rows(shape, sequences);
    const int64_t C = shape.C, P = shape.P, blocks = sequences.front().latents.scale_blocks(), width = blocks * BLOCK;
    const int64_t code_bytes = ROWS * width * int64_t(sizeof(QueryCode)), rope_bytes = round_up(ROWS * P * int64_t(sizeof(Query)), 64);
    const int64_t pass_bytes = code_bytes + 2 * blocks * ROWS * 4 + rope_bytes;
    thread_local Scratch query_scratch;
    uint8_t* storage = query_scratch.reserve<uint8_t>(rows.passes() * pass_bytes);
    std::memset(storage, 0, rows.passes() * pass_bytes);  // zeros for unused rows
    const auto queries_of = [&](int64_t pass) {
        uint8_t* at = storage + pass * pass_bytes;
        float* scales = reinterpret_cast<float*>(at + code_bytes);
        int32_t* starts = reinterpret_cast<int32_t*>(scales + blocks * ROWS);
        return Queries{reinterpret_cast<QueryCode*>(at), scales, starts, reinterpret_cast<Query*>(starts + blocks * ROWS)};
    };
    each_row(rows.count(), [&](int64_t i) {
        const int64_t row = rows.number(i);
        Queries queries = queries_of(row / ROWS);
        for (int64_t b = 0; b < blocks; b++) {
            float scaled[BLOCK];
            const int64_t count = std::min<int64_t>(BLOCK, C - b * BLOCK);
            for (int64_t k = 0; k < count; k++) scaled[k] = latent[i * C + b * BLOCK + k] * scale;
            queries.put_block(row % ROWS, b, scaled, count);
        }
        queries.put_rope(row % ROWS, rope + i * P, P);
    });
    const int64_t stride = round_up(blocks, LANES);
    absorbed<ROWS>(shape, rows, width, mixed, [&](int64_t pass, int64_t end, int64_t s, int64_t n, float* out, Part<ROWS>* parts) {
        thread_local Scratch work_scratch, scale_scratch;
        const Latents& latents = rows.latents(pass);
        Work& work = *work_scratch.reserve<Work>(1);
        float* scales = scale_scratch.reserve<float>(CHUNK * stride);
        for (int64_t k = 0; k < CHUNK; k++) work.rows[k] = latents.row(s + std::min(k, n - 1));
        score_chunk(latents, n, end - pass, [&](int64_t i) { return queries_of(pass + i); }, scales, stride, work);
        for (int64_t i = 0; i < end - pass; i++) {
            rows.limits(pass + i, s, n, work.limits[i]);
            softmax_chunk(work.weights[i], n, work.limits[i], parts[i]);
            if (n % 2) std::memset(work.weights[i][n], 0, sizeof work.weights[i][n]);  // paired with the last position
        }
        mix_chunk(latents, n, end - pass, scales, stride, work, out);
    });
}

}  // namespace dsv2
