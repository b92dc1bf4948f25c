// What absorbed attention over bf16 and over 8-bit latents has in common: shapes, query rows, and the split of the work
// into pieces with a running softmax (as in flash decoding).
#pragma once

#include <algorithm>
#include <vector>

#include "latents.hpp"
#include "matrix.hpp"
#include "pool.hpp"

namespace dsv2 {

// Shapes: H heads; per head N and P numbers of a query without and with rotation, and V of a value; C numbers of a
// latent.
struct Shape {
    int64_t H, N, P, C, V;
    int64_t width() const { return C + P; }
};

// The tokens of one sequence in a step: `count` rows of the step from `first` on, at the last positions of `length`.
struct Tokens {
    int64_t first, count, length;
    Latents latents;
    int64_t visible(int64_t token) const { return length - count + token + 1; }  // positions that a token attends to
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A piece of work is one chunk of positions times up to TOGETHER passes; a pass is ROWS query rows of one sequence.
constexpr int64_t CHUNK = 256;    // positions per piece
constexpr int64_t TOGETHER = 4;   // passes per piece at most: they share the unpacked positions
constexpr int64_t PIECES = 256;   // partial results (a pass over a chunk) that are stored before they are merged
constexpr int64_t SPREAD = 32;    // pieces that suffice to keep all threads busy
static_assert(CHUNK % CACHE_BLOCK == 0, "a chunk begins at the start of a block");

// Query: the type of a stored query number. STEP: numbers of a query row that one instruction multiplies with as many
// of a latent.
#if DSV2_BF16
typedef uint16_t Query;
constexpr int STEP = 2 * LANES;
typedef __m512bh Packed;
inline Query to_query(float x) { return to_bf16(x); }
inline Packed load_query(const Query* p) { return (Packed)_mm512_loadu_si512(p); }
inline Vec dot_add(Vec sum, Packed a, Packed b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
typedef float Query;
constexpr int STEP = LANES;
typedef Vec Packed;
inline Query to_query(float x) { return x; }
inline Packed load_query(const Query* p) { return load(p); }
inline Vec dot_add(Vec sum, Packed a, Packed b) { return fma(a, b, sum); }
#endif

// Maximum and sum of the softmax of ROWS rows over one chunk; the unnormalised result is stored elsewhere.
template <int ROWS>
struct Part {
    float maximum[ROWS], total[ROWS];
};

// Replace each row's scores by exp(score - maximum), and by 0 from position limits[row] on. Lanes are rows.
template <int ROWS>
void softmax_chunk(float (*scores)[ROWS], int64_t n, const int32_t* limits, Part<ROWS>& part) {
    for (int at = 0; at < ROWS; at += LANES) {
        Int limit;
        std::memcpy(&limit, limits + at, sizeof limit);
        Vec largest = splat(-INFINITY), total{};
        for (int64_t s = 0; s < n; s++) {
            const Vec masked = splat_int(int32_t(s)) < limit ? load(scores[s] + at) : splat(-INFINITY);
            store(scores[s] + at, masked);
            largest = maximum(largest, masked);
        }
        const Vec base = largest > -INFINITY ? largest : Vec{};  // 0 for a row that attends to none of these positions
        for (int64_t s = 0; s < n; s++) {
            const Vec p = exponential(load(scores[s] + at) - base);
            store(scores[s] + at, p);
            total += p;
        }
        store(part.maximum + at, largest);
        store(part.total + at, total);
    }
}

// The query rows, one per token and head, of consecutive sequences of a step. They are numbered in whole passes: the
// rows of a sequence begin with a pass of their own, and the last of its passes may have unused rows.
template <int ROWS>
class QueryRows {
  public:
    QueryRows(const Shape& shape, const std::vector<Tokens>& sequences) : H_(shape.H) {
        for (const Tokens& sequence : sequences) {
            const int64_t row = passes() * ROWS;
            for (int64_t t = 0; t < sequence.count; t++) tokens_.push_back({&sequence, row + t * H_, t});
            owners_.resize(owners_.size() + (sequence.count * H_ + ROWS - 1) / ROWS, {&sequence, row});
            longest_ = std::max(longest_, sequence.length);
        }
    }
    int64_t passes() const { return int64_t(owners_.size()); }
    int64_t longest() const { return longest_; }                     // positions of the longest sequence
    int64_t count() const { return int64_t(tokens_.size()) * H_; }  // rows that are used
    // The number of the i-th used row, which is head i % H of the i / H-th token.
    int64_t number(int64_t i) const { return tokens_[i / H_].row + i % H_; }
    int64_t visible_to_used(int64_t i) const { return tokens_[i / H_].sequence->visible(tokens_[i / H_].token); }
    // How many positions row `number` attends to; an unused row like the last used one of its sequence.
    int64_t visible(int64_t number) const {
        const Owner& owner = owners_[number / ROWS];
        return owner.sequence->visible(std::min((number - owner.row) / H_, owner.sequence->count - 1));
    }
    const Latents& latents(int64_t pass) const { return owners_[pass].sequence->latents; }
    // Whether CHUNK positions from s on are the same blocks of the cache for two passes, and before the tokens of both.
    bool share(int64_t pass, int64_t other, int64_t s) const {
        const Tokens *a = owners_[pass].sequence, *b = owners_[other].sequence;
        if (a == b) return true;
        if (s + CHUNK > std::min(a->length - a->count, b->length - b->count)) return false;
        const int64_t* blocks = a->latents.blocks + s / CACHE_BLOCK;
        return std::equal(blocks, blocks + CHUNK / CACHE_BLOCK, b->latents.blocks + s / CACHE_BLOCK);
    }
    // How many of positions [s, s + n) each row of a pass attends to.
    void limits(int64_t pass, int64_t s, int64_t n, int32_t (&limits)[ROWS]) const {
        for (int r = 0; r < ROWS; r++) limits[r] = int32_t(std::clamp<int64_t>(visible(pass * ROWS + r) - s, 0, n));
    }

  private:
    struct Token {
        const Tokens* sequence;
        int64_t row, token;
    };
    struct Owner {
        const Tokens* sequence;
        int64_t row;  // the sequence's first
    };
    int64_t H_, longest_ = 0;
    std::vector<Token> tokens_;
    std::vector<Owner> owners_;
};

// mixed [tokens · H, C] = softmax-weighted sums of the latents. step(pass, end, s, n, out, parts) computes the
// unnormalised sums over positions [s, s + n), at most CHUNK, of the sequence of `pass`, for the rows of passes [pass,
// end), which share these positions: it adds to out [rows, width], which is zero before, and fills parts [passes].
//
// The chunks of a row are merged one by one in order, so that its result does not depend on the other rows or on the
// number of threads.
template <int ROWS, class Step>
void absorbed(const Shape& shape, const QueryRows<ROWS>& rows, int64_t width, float* mixed, const Step& step) {
    const int64_t used = rows.count(), passes = rows.passes(), C = shape.C;
    const int64_t chunks = (rows.longest() + CHUNK - 1) / CHUNK, round = std::clamp<int64_t>(PIECES / passes, 1, chunks);
    const int64_t together = std::clamp<int64_t>(passes * round / SPREAD, 1, TOGETHER);
    struct Item {
        int64_t pass, end, chunk, n;
    };
    thread_local std::vector<Item> items;
    thread_local Scratch part_scratch, sum_scratch, merged_scratch;
    float* sums = sum_scratch.reserve<float>(round * passes * ROWS * width);
    Part<ROWS>* parts = part_scratch.reserve<Part<ROWS>>(round * passes);
    float *largest = merged_scratch.reserve<float>(2 * used), *total = largest + used;
    std::fill(largest, total, -INFINITY);
    std::fill(total, total + used, 0.0f);
    std::memset(mixed, 0, used * C * sizeof(float));

    for (int64_t first = 0; first < chunks; first += round) {
        const int64_t last = std::min(first + round, chunks);
        items.clear();
        // Consecutive items use the same positions, so that these are read from memory once.
        for (int64_t chunk = first; chunk < last; chunk++)
            for (int64_t pass = 0, end; pass < passes; pass = end) {
                const int64_t s = chunk * CHUNK;
                end = pass + 1;
                while (end < passes && end - pass < together && rows.share(pass, end, s)) end++;
                const int64_t n = std::min(CHUNK, rows.visible(end * ROWS - 1) - s);
                if (n > 0) items.push_back({pass, end, chunk, n});
            }
        const Item* all = items.data();  // of this thread, whichever thread runs an item
        parallel(int64_t(items.size()), [&](int64_t i) {
            const auto [pass, end, chunk, n] = all[i];
            const int64_t at = (chunk - first) * passes + pass;
            float* out = sums + at * ROWS * width;
            std::memset(out, 0, (end - pass) * ROWS * width * sizeof(float));
            step(pass, end, chunk * CHUNK, n, out, parts + at);
        }, Claim::WHOLE);
        parallel(used, [&](int64_t i) {
            const int64_t row = rows.number(i), seen = std::min(last, (rows.visible_to_used(i) + CHUNK - 1) / CHUNK);
            float* to = mixed + i * C;
            for (int64_t chunk = first; chunk < seen; chunk++) {
                const int64_t at = (chunk - first) * passes + row / ROWS;
                const float part = parts[at].maximum[row % ROWS], merged = std::max(largest[i], part);
                if (part == -INFINITY) continue;  // all scores are -inf
                const float keep = std::exp(largest[i] - merged), add = std::exp(part - merged);
                const float* from = sums + (at * ROWS + row % ROWS) * width;
                for (int64_t c = 0; c < C; c++) to[c] = to[c] * keep + from[c] * add;
                total[i] = total[i] * keep + parts[at].total[row % ROWS] * add;
                largest[i] = merged;
            }
            if (last == chunks)
                for (int64_t c = 0; c < C; c++) to[c] /= total[i];
        });
    }
}

// mixed [tokens · H, C] from the queries in latent space, `latent` [tokens · H, C], not yet scaled, and their rope
// parts [tokens · H, P], rotated and scaled, of consecutive sequences. `mixed` may be the same memory as `latent`.
void absorbed_bf16(const Shape& shape, const std::vector<Tokens>& sequences, const float* latent, const float* rope,
                   float scale, float* mixed);
void absorbed_int8(const Shape& shape, const std::vector<Tokens>& sequences, const float* latent, const float* rope,
                   float scale, float* mixed);

}  // namespace dsv2
