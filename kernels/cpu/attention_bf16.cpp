// Absorbed attention over bf16 latents.
#include "attention.hpp"

#include "rows.hpp"

namespace dsv2 {
namespace {

#if DSV2_AVX512
constexpr int ROWS = 8;  // query rows (one per token and head) that share a pass over the cache

// The bf16 rows of a chunk of positions.
struct Positions {
    const uint16_t* blocks[CHUNK / CACHE_BLOCK];
    int64_t width;

    Positions(const Latents& latents, int64_t from, int64_t n) : width(latents.C + latents.P) {
        for (int64_t s = 0; s < n; s += CACHE_BLOCK)
            blocks[s / CACHE_BLOCK] = reinterpret_cast<const uint16_t*>(latents.row(from + s));
    }
    const uint16_t* row(int64_t s) const { return blocks[s / CACHE_BLOCK] + s % CACHE_BLOCK * width; }
};

inline Packed load_latent(const uint16_t* p) {
#if DSV2_BF16
    return (Packed)_mm512_loadu_si512(p);
#else
    return load_bf16(p);
#endif
}

constexpr int64_t STRIDE = STEP;
constexpr int64_t AHEAD_ROWS = 8;  // positions by which the prefetch is ahead of the scores
constexpr int TILE = 2;            // positions (in `score`) or registers of columns (in `mix`) per ROWS rows at a time

// Index of number d of query row `row` in the stored queries: what ROWS rows need in one step is adjacent. A row has
// `padded` numbers.
inline int64_t query_index(int64_t row, int64_t d, int64_t padded) {
    return (row / ROWS * padded + d / STEP * STEP) * ROWS + row % ROWS * STEP + d % STEP;
}

// scores[r][s] = queries[r] · latents[s] for s in [0, n); queries in the order of `query_index`, zeros past a row's
// width.
void score(const Query* queries, const Positions& latents, int64_t n, float (*scores)[CHUNK]) {
    const int64_t width = latents.width, whole = width / STEP * STEP;
    for (int64_t s = 0; s < n; s += TILE) {
        const uint16_t *rows[TILE], *ahead[TILE];
        for (int k = 0; k < TILE; k++) {
            rows[k] = latents.row(std::min(s + k, n - 1));
            ahead[k] = latents.row(std::min(s + k + AHEAD_ROWS, n - 1));
        }
        Vec sums[TILE][ROWS] = {};
        const auto multiply = [&](int64_t d, const Packed (&keys)[TILE]) {
            for (int r = 0; r < ROWS; r++) {
                const Packed query = load_query(queries + d * ROWS + r * STEP);
                for (int k = 0; k < TILE; k++) sums[k][r] = dot_add(sums[k][r], query, keys[k]);
            }
        };
        Packed keys[TILE];
        for (int64_t d = 0; d < whole; d += STEP) {
            for (int k = 0; k < TILE; k++) {
                __builtin_prefetch(ahead[k] + d, 0, 2);
                keys[k] = load_latent(rows[k] + d);
            }
            multiply(d, keys);
        }
        if (whole < width) {  // the last numbers, from a zero-padded copy
            for (int k = 0; k < TILE; k++) {
                uint16_t tail[STEP] = {};
                std::memcpy(tail, rows[k] + whole, (width - whole) * sizeof *tail);
                keys[k] = load_latent(tail);
            }
            multiply(whole, keys);
        }
        for (int k = 0; k < TILE; k++)
            for (int r = 0; r < ROWS; r += 4) {
                float four[4];
                sum_four({sums[k][r], sums[k][r + 1], sums[k][r + 2], sums[k][r + 3]}, four);
                for (int i = 0; i < 4 && s + k < n; i++) scores[r + i][s + k] = four[i];
            }
    }
}

// Softmax weights in the form that `mix_columns` multiplies; BESIDE: positions that one instruction adds up.
#if DSV2_BF16
constexpr int BESIDE = 2;
inline void pack_weights(const float* weights, uint32_t* packed) {
    for (int64_t s = 0; s < CHUNK; s += LANES) {
        const __m256bh halves = _mm512_cvtneps_pbh((__m512)load(weights + s));
        std::memcpy(packed + s / 2, &halves, sizeof halves);
    }
}
#else
constexpr int BESIDE = 1;
inline void pack_weights(const float* weights, uint32_t* packed) { std::memcpy(packed, weights, CHUNK * sizeof *packed); }
#endif

// out[r][c] += Σ_s weights[r][s] · latents[s][first + c] for TILE registers of columns and n positions. Weights from n
// on are 0, so that a last position without a partner can be paired with itself.
inline void mix_columns(const uint32_t (*packed)[CHUNK], const Positions& latents, int64_t first, int64_t n, float* out,
                        int64_t C) {
    Vec sums[ROWS][TILE] = {};
    for (int64_t block = 0; block < n; block += CACHE_BLOCK) {
        const uint16_t* row = latents.row(block) + first;
        const int64_t end = std::min(block + CACHE_BLOCK, n);
        for (int64_t s = block; s < end; s += BESIDE, row += BESIDE * latents.width) {
#if DSV2_BF16
            // Interleaving the numbers of two positions permutes the lanes; `in_order` undoes it below.
            const uint16_t* next = s + 1 < end ? row + latents.width : row;
            const __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(next);
            const __m512bh columns[TILE] = {(__m512bh)_mm512_unpacklo_epi16(a, b), (__m512bh)_mm512_unpackhi_epi16(a, b)};
            for (int r = 0; r < ROWS; r++) {
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(int32_t(packed[r][s / 2]));
                for (int v = 0; v < TILE; v++) sums[r][v] = dot_add(sums[r][v], weight, columns[v]);
            }
#else
            Vec columns[TILE];
            for (int v = 0; v < TILE; v++) columns[v] = load_bf16(row + v * LANES);
            for (int r = 0; r < ROWS; r++) {
                float weight;
                std::memcpy(&weight, &packed[r][s], 4);
                for (int v = 0; v < TILE; v++) sums[r][v] = fma(splat(weight), columns[v], sums[r][v]);
            }
#endif
        }
    }
    for (int r = 0; r < ROWS; r++) {
#if DSV2_BF16
        in_order(sums[r]);
#endif
        for (int v = 0; v < TILE; v++) {
            float* to = out + r * C + v * LANES;
            store(to, load(to) + sums[r][v]);
        }
    }
}

void mix(const float (*weights)[CHUNK], const Positions& latents, int64_t n, float* out, int64_t C) {
    alignas(64) uint32_t packed[ROWS][CHUNK];
    for (int r = 0; r < ROWS; r++) pack_weights(weights[r], packed[r]);
    int64_t c = 0;
    for (; c + TILE * LANES <= C; c += TILE * LANES) mix_columns(packed, latents, c, n, out + c, C);
    for (; c < C; c++)
        for (int r = 0; r < ROWS; r++)
            for (int64_t s = 0; s < n; s++) out[r * C + c] += weights[r][s] * from_bf16(latents.row(s)[c]);
}

// Replace scores by exp(score - maximum), and by 0 from `limit` on; gives their maximum and sum.
void softmax_row(float* scores, int64_t limit, float& maximum_score, float& total) {
    limit = std::max<int64_t>(limit, 0);
    for (int64_t s = limit; s < CHUNK; s++) scores[s] = -INFINITY;
    Vec largest = splat(-INFINITY), sums{};
    for (int64_t s = 0; s < CHUNK; s += LANES) largest = maximum(largest, load(scores + s));
    maximum_score = max_lane(largest);
    const float base = limit ? maximum_score : 0.0f;
    for (int64_t s = 0; s < CHUNK; s += LANES) {
        const Vec p = exponential(load(scores + s) - base);
        store(scores + s, p);
        sums += p;
    }
    total = sum(sums);
}

void attend(const Shape& shape, const QueryRows<ROWS>& rows, const Query* queries, int64_t padded, int64_t pass,
            int64_t end, int64_t s, int64_t n, float* out, Part<ROWS>* parts) {
    alignas(64) float weights[ROWS][CHUNK];
    const Positions positions(rows.latents(pass), s, n);
    for (; pass < end; pass++, out += ROWS * shape.C, parts++) {
        score(queries + pass * ROWS * padded, positions, n, weights);
        for (int r = 0; r < ROWS; r++)
            softmax_row(weights[r], std::min(n, rows.visible(pass * ROWS + r) - s), parts->maximum[r], parts->total[r]);
        mix(weights, positions, n, out, shape.C);
    }
}

#else
// Lanes of scores are query rows. The even and the odd numbers of a latent are converted to fp32 separately, since each
// takes one instruction.
constexpr int ROWS = 16, VECS = ROWS / LANES;  // query rows that share a pass over the cache
constexpr int TILE = 4;                        // positions whose scores are computed at a time
constexpr int MIXED = 4;                       // rows whose sums are computed at a time, two registers of columns each
constexpr int64_t STRIDE = 2 * LANES;          // bf16 numbers of a latent in a register

inline Int load_pairs(const uint16_t* p) {
    Int pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return pairs;
}
inline Vec even(Int pairs) { return (Vec)(pairs << 16); }
inline Vec odd(Int pairs) { return (Vec)(pairs & -0x10000); }

// Index of number d of query row `row` in the stored queries. A row has `padded` numbers.
inline int64_t query_index(int64_t row, int64_t d, int64_t padded) {
    const int64_t column = d / STRIDE * STRIDE + d % 2 * LANES + d % STRIDE / 2;
    return (row / ROWS * padded + column) * ROWS + row % ROWS;
}

// The positions of a chunk in fp32, one tile at a time: [padded / STRIDE, TILE, STRIDE], zeros past a row's width.
struct Tiles {
    const Latents& latents;
    int64_t from, padded, width, whole;
    float *tile, *next;
    const uint16_t *rows[TILE], *ahead[TILE];  // cache rows of the next tile, and of the tile after it

    Tiles(Scratch& scratch, const Latents& all, int64_t first, int64_t length)
        : latents(all), from(first), padded(length), width(all.C + all.P), whole(width / STRIDE * STRIDE) {
        tile = scratch.reserve<float>(2 * TILE * padded), next = tile + TILE * padded;
    }
    void find(int64_t s, int64_t n, const uint16_t* (&found)[TILE]) const {
        for (int t = 0; t < TILE; t++)
            found[t] = reinterpret_cast<const uint16_t*>(latents.row(from + std::min(s + t, n - 1)));
    }
    void put(int64_t d, int t, const uint16_t* numbers) {
        const Int pairs = load_pairs(numbers);
        store(next + d * TILE + t * STRIDE, even(pairs));
        store(next + d * TILE + t * STRIDE + LANES, odd(pairs));
    }
    void convert(int64_t d) {
        for (int t = 0; t < TILE; t++) {
            __builtin_prefetch(ahead[t] + d);
            put(d, t, rows[t] + d);
        }
    }
    void convert_tail() {
        for (int t = 0; t < TILE && whole < width; t++) {
            uint16_t tail[STRIDE] = {};
            std::memcpy(tail, rows[t] + whole, (width - whole) * sizeof *tail);
            put(whole, t, tail);
        }
    }
};

// scores[pass][s][row] = queries[pass][row] · latents[from + s] for s in [0, n). While one tile is multiplied, the next
// is converted and the one after that prefetched.
void score(const float* queries, int64_t padded, int64_t passes, const Latents& latents, int64_t from, int64_t n,
           float (*scores)[CHUNK][ROWS]) {
    thread_local Scratch scratch;
    Tiles tiles(scratch, latents, from, padded);
    tiles.find(0, n, tiles.rows);
    tiles.find(TILE, n, tiles.ahead);
    for (int64_t d = 0; d < tiles.whole; d += STRIDE) tiles.convert(d);
    tiles.convert_tail();
    for (int64_t s = 0; s < n; s += TILE) {
        std::swap(tiles.tile, tiles.next);
        std::copy(tiles.ahead, tiles.ahead + TILE, tiles.rows);
        tiles.find(s + 2 * TILE, n, tiles.ahead);
        for (int64_t pass = 0; pass < passes; pass++) {
            const float* rows = queries + pass * padded * ROWS;
            Vec sums[TILE][VECS] = {};
            for (int64_t d = 0; d < padded; d += STRIDE) {
                const float* keys = tiles.tile + d * (TILE - 1);
                for (int64_t i = d; i < d + STRIDE; i++)
                    for (int t = 0; t < TILE; t++)
                        for (int v = 0; v < VECS; v++)
                            sums[t][v] = fma(splat(keys[t * STRIDE + i]), load(rows + i * ROWS + v * LANES), sums[t][v]);
                if (pass == 0 && d < tiles.whole) tiles.convert(d);
            }
            for (int t = 0; t < TILE; t++)
                for (int v = 0; v < VECS; v++) store(scores[pass][s + t] + v * LANES, sums[t][v]);
        }
        tiles.convert_tail();  // outside the loop: the function call would spill the sums
    }
}

// out[row][c] += Σ_s weights[s][row] · latents[from + s][c], block by block, so that the columns of a block stay in L1.
void mix(const float (*weights)[ROWS], const Latents& latents, int64_t from, int64_t n, float* out) {
    const int64_t C = latents.C, width = C + latents.P;
    for (int64_t block = 0; block < n; block += CACHE_BLOCK, weights += CACHE_BLOCK) {
        const auto* rows = reinterpret_cast<const uint16_t*>(latents.row(from + block));
        const int64_t count = std::min(CACHE_BLOCK, n - block);
        int64_t c = 0;
        for (; c + STRIDE <= C; c += STRIDE)
            for (int row = 0; row < ROWS; row += MIXED) {
                Vec sums[MIXED][2] = {};
                for (int64_t s = 0; s < count; s++) {
                    const Int pairs = load_pairs(rows + s * width + c);
                    const Vec columns[2] = {even(pairs), odd(pairs)};
                    for (int r = 0; r < MIXED; r++)
                        for (int v = 0; v < 2; v++) sums[r][v] = fma(splat(weights[s][row + r]), columns[v], sums[r][v]);
                }
                for (int r = 0; r < MIXED; r++) {
                    zip(sums[r]);
                    for (int v = 0; v < 2; v++) {
                        float* to = out + (row + r) * C + c + v * LANES;
                        store(to, load(to) + sums[r][v]);
                    }
                }
            }
        for (; c < C; c++)
            for (int row = 0; row < ROWS; row++)
                for (int64_t s = 0; s < count; s++) out[row * C + c] += weights[s][row] * from_bf16(rows[s * width + c]);
    }
}

void attend(const Shape& shape, const QueryRows<ROWS>& rows, const Query* queries, int64_t padded, int64_t pass,
            int64_t end, int64_t s, int64_t n, float* out, Part<ROWS>* parts) {
    thread_local Scratch scratch;
    const Latents& latents = rows.latents(pass);
    auto* weights = reinterpret_cast<float(*)[CHUNK][ROWS]>(scratch.reserve<float>(TOGETHER * CHUNK * ROWS));
    score(queries + pass * ROWS * padded, padded, end - pass, latents, s, n, weights);
    for (int64_t i = 0; pass + i < end; i++) {
        int32_t limits[ROWS];
        rows.limits(pass + i, s, n, limits);
        softmax_chunk(weights[i], n, limits, parts[i]);
        mix(weights[i], latents, s, n, out + i * ROWS * shape.C);
    }
}
#endif

}  // namespace

void absorbed_bf16(const Shape& shape, const std::vector<Tokens>& sequences, const float* latent, const float* rope,
                   float scale, float* mixed) {
    const QueryRows<ROWS> rows(shape, sequences);
    const int64_t C = shape.C, P = shape.P, padded = round_up(shape.width(), STRIDE);
    const int64_t count = rows.passes() * ROWS * padded;
    thread_local Scratch scratch;
    Query* queries = scratch.reserve<Query>(count);
    std::memset(queries, 0, count * sizeof(Query));
    each_row(rows.count(), [&](int64_t i) {
        const int64_t row = rows.number(i);
        const auto put = [&](int64_t d, float value) { queries[query_index(row, d, padded)] = to_query(value); };
        for (int64_t c = 0; c < C; c++) put(c, latent[i * C + c] * scale);
        for (int64_t d = 0; d < P; d++) put(C + d, rope[i * P + d]);
    });
    absorbed<ROWS>(shape, rows, C, mixed,
                   [&](int64_t pass, int64_t end, int64_t s, int64_t n, float* out, Part<ROWS>* parts) {
                       attend(shape, rows, queries, padded, pass, end, s, n, out, parts);
                   });
}

}  // namespace dsv2
