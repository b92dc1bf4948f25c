// Matrix products: with one matrix, and of whole mixtures of experts.
#include "matrix.hpp"

#include <algorithm>
#include <vector>

#include "api.hpp"
#include "rows.hpp"

namespace dsv2 {

void Matrix::dequantize_row(int64_t row, float* out, int64_t stride) const {
    const int64_t r = row % GROUP;
    const uint8_t* group = group_codes(row / GROUP);
    const uint16_t* group_scale = group_scales(row / GROUP);
    for (int64_t col = 0; col < cols; col++) {
        const int64_t b = col / BLOCK, c = col % BLOCK;
        const float scale = from_fp16(group_scale[b * GROUP + r]);
        if (format == NF4) {
            const uint8_t byte = group[b * tile_bytes() + (c / 8 * GROUP + r) * 4 + c % 4];
            out[col * stride] = (NF4_CODES[c % 8 < 4 ? byte & 15 : byte >> 4] - NF4_BIAS) * NF4_STEP * scale;
        } else {
            out[col * stride] = int8_t(group[b * tile_bytes() + (c / 4 * GROUP + r) * 4 + c % 4]) * scale;
        }
    }
}

namespace {

// Bytes of weights per work item: long enough to read at full speed, short enough to divide evenly among threads.
constexpr int64_t ITEM_BYTES = 1 << 16;
constexpr int64_t FEW = 8;  // up to this many tokens a product is limited by memory bandwidth, not by arithmetic
Claim claim_of(int64_t tokens) { return tokens > FEW ? Claim::QUARTER : Claim::WHOLE; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Groups of rows per work item: whole tiles of panels; for few tokens about ITEM_BYTES of weights.
int64_t item_groups(const Matrix& m, int64_t tokens) {
    const int64_t unit = 2 * TILE_PANELS * PANEL_GROUPS;
    if (tokens > FEW) return unit;
    return std::max<int64_t>(1, ITEM_BYTES / (m.blocks() * m.tile_bytes()) / unit) * unit;
}

// One expert and its tokens; its hidden activations are rows [slot, slot + count).
struct Expert {
    Matrix gate, up, down;
    int64_t count, slot;
    const int32_t* tokens;  // rows of x; null: all rows in order
    const float* weights;   // null: all 1
    const int32_t* rows;    // rows of y that the results are added to; null: as `tokens`
};

// y [rows, D] = Σ over experts, in their order, of weight · down(silu(gate x) · up x).
void mixture(const float* x, int64_t tokens, const std::vector<Expert>& experts, float* y, int64_t rows) {
    thread_local Scratch input_scratch, hidden_scratch;
    const Matrix &gate = experts[0].gate, &down = experts[0].down;
    Activations input(input_scratch, tokens, gate.cols, gate.format);
    each_row(tokens, [&](int64_t t) { input.quantize(t, x + t * gate.cols, gate.cols); });

    struct Item {
        const Expert* expert;
        int64_t block, from, count;
    };
    std::vector<Item> items;
    int64_t slots = 0;
    for (const Expert& expert : experts) {
        slots = std::max(slots, expert.slot + expert.count);
        for (int64_t from = 0; from < expert.count; from += TOKEN_BLOCK)
            for (int64_t block = 0; block < down.blocks(); block++)
                items.push_back({&expert, block, from, std::min(TOKEN_BLOCK, expert.count - from)});
    }
    const int64_t typical = ceil_div(slots, int64_t(experts.size()));  // tokens of an expert
    Activations hidden(hidden_scratch, slots, down.cols, down.format);
    const auto hidden_blocks = [&](const Item& item, int64_t blocks) {
        // 64 hidden numbers are a block of the next product's activations, so they are quantised as soon as computed.
        const Expert& expert = *item.expert;
        thread_local Scratch scratch;
        const int64_t width = blocks * BLOCK, first = item.block * BLOCK, group = first / GROUP;
        float* gates = scratch.reserve<float>(2 * item.count * width);
        float* ups = gates + item.count * width;
        const int64_t end = std::min(group + width / GROUP, expert.gate.groups());
        if ((end - group) * GROUP < width) std::memset(gates, 0, 2 * item.count * width * sizeof(float));
        const Selection selected = Selection{input, expert.count, 0, expert.tokens}.part(item.from, item.count);
        const auto into = [&](float* out) {
            return [=](int64_t row, int64_t t, Vec v) {
                store_lanes(out + t * width + row - first, v, end * GROUP - row);
            };
        };
        multiply(expert.gate, group, end, selected, into(gates));
        multiply(expert.up, group, end, selected, into(ups));
        for (int64_t t = 0; t < item.count; t++)
            for (int64_t b = 0; b < blocks; b++) {
                float *h = gates + t * width + b * BLOCK, *up = ups + t * width + b * BLOCK;
                for (int k = 0; k < BLOCK; k += LANES) store(h + k, silu(load(h + k)) * load(up + k));
                hidden.quantize_block(expert.slot + item.from + t, item.block + b, h);
            }
    };
    // Adjacent blocks of an expert with few tokens are computed together: longer reads stall on memory less often.
    parallel_ranges(int64_t(items.size()), claim_of(typical), [&](int64_t i, int64_t to) {
        for (int64_t next; i < to; i = next) {
            next = i + 1;
            while (next < to && items[i].count <= FEW && items[next].expert == items[i].expert) next++;
            hidden_blocks(items[i], next - i);
        }
    });

    const int64_t step = item_groups(down, typical), groups = down.groups();
    parallel_ranges(ceil_div(groups, step), claim_of(typical), [&](int64_t i, int64_t to) {
        const int64_t group = i * step, end = std::min(to * step, groups);
        const int64_t row0 = group * GROUP, width = std::min(end * GROUP, down.rows) - row0;
        for (int64_t t = 0; t < rows; t++) std::memset(y + t * down.rows + row0, 0, width * sizeof(float));
        for (const Expert& expert : experts)
            for (int64_t from = 0; from < expert.count; from += TOKEN_BLOCK) {
                const int64_t count = std::min(TOKEN_BLOCK, expert.count - from);
                const Selection selected{hidden, count, expert.slot + from, nullptr};
                multiply(expert.down, group, end, selected, [&](int64_t row, int64_t k, Vec v) {
                    const int32_t* to = expert.rows ? expert.rows : expert.tokens;
                    const int64_t t = to ? to[from + k] : from + k;
                    const Vec weight = splat(expert.weights ? expert.weights[from + k] : 1.0f);
                    const int64_t valid = std::min(end * GROUP, down.rows) - row;
                    float* out = y + t * down.rows + row;
                    store_lanes(out, fma(v, weight, load_lanes(out, valid)), valid);
                });
            }
    });
}

// View an expert's record as gate, up and down, in the order of `format.ExpertLayout`.
Expert expert_at(const uint8_t* record, int32_t format, int64_t hidden, int64_t intermediate) {
    Expert expert{};
    Matrix* matrices[] = {&expert.gate, &expert.up, &expert.down};
    for (Matrix* m : matrices) {
        const bool down = m == &expert.down;
        *m = {record, nullptr, down ? hidden : intermediate, down ? intermediate : hidden, format};
        m->scales = reinterpret_cast<const uint16_t*>(record + m->code_bytes());
        record += m->nbytes();
    }
    return expert;
}

// The indices [0, count) sorted by the expert ids[i] (a counting sort).
struct Grouped {
    std::vector<int64_t> begin;  // where each expert's indices begin in `order`
    std::vector<int32_t> order;

    Grouped(const int64_t* ids, int64_t count, int64_t experts) : begin(experts + 1, 0), order(count) {
        for (int64_t i = 0; i < count; i++) begin[ids[i] + 1]++;
        for (int64_t e = 0; e < experts; e++) begin[e + 1] += begin[e];
        std::vector<int64_t> next(begin.begin(), begin.end() - 1);
        for (int64_t i = 0; i < count; i++) order[next[ids[i]]++] = int32_t(i);
    }

    // The experts that have indices; the caller sets their tokens, weights and rows.
    std::vector<Expert> experts(const uint8_t* records, int64_t stride, int32_t format, int64_t hidden,
                                int64_t intermediate) const {
        std::vector<Expert> used;
        for (size_t e = 0; e + 1 < begin.size(); e++) {
            if (begin[e] == begin[e + 1]) continue;
            used.push_back(expert_at(records + e * stride, format, hidden, intermediate));
            used.back().count = begin[e + 1] - begin[e];
            used.back().slot = begin[e];
        }
        return used;
    }
};

}  // namespace

void heads_linear(const float* x, int64_t tokens, int64_t heads, const Matrix& m, float* y) {
    thread_local Scratch scratch;
    Activations input(scratch, tokens * heads, m.cols, m.format);
    each_row(tokens * heads, [&](int64_t row) {  // head by head, so that the tokens of a head are adjacent
        const int64_t head = row / tokens, t = row % tokens;
        input.quantize(row, x + (t * heads + head) * m.cols, m.cols);
    });
    const int64_t head_groups = m.groups() / heads, step = std::min(item_groups(m, tokens), head_groups);
    const int64_t per_head = ceil_div(head_groups, step), passes = ceil_div(tokens, TOKEN_BLOCK);
    parallel(passes * heads * per_head, [&](int64_t i) {
        const int64_t head = i % (heads * per_head) / per_head, from = i / (heads * per_head) * TOKEN_BLOCK;
        const int64_t group = head * head_groups + i % per_head * step;
        const int64_t end = std::min(group + step, (head + 1) * head_groups);
        const Selection selected{input, std::min(TOKEN_BLOCK, tokens - from), head * tokens + from, nullptr};
        multiply(m, group, end, selected, [&](int64_t row, int64_t t, Vec v) {
            store_lanes(y + (from + t) * m.rows + row, v, std::min(end * GROUP, m.rows) - row);
        });
    }, claim_of(tokens));
}

}  // namespace dsv2

using namespace dsv2;

API void dsv2_linear(const float* x, int64_t tokens, int64_t heads, const Matrix* m, float* y) {
    heads_linear(x, tokens, heads, *m, y);
}

API void dsv2_swiglu(const float* x, int64_t tokens, const Matrix* gate, const Matrix* up, const Matrix* down, float* y) {
    mixture(x, tokens, {{*gate, *up, *down, tokens, 0, nullptr, nullptr, nullptr}}, y, tokens);
}

API void dsv2_experts(const float* x, int64_t tokens, const uint8_t* records, int64_t stride, int64_t experts,
                      int32_t format, int64_t hidden, int64_t intermediate, const int64_t* ids, const float* weights,
                      int64_t k, float* y) {
    const Grouped grouped(ids, tokens * k, experts);
    std::vector<int32_t> token(tokens * k);
    std::vector<float> token_weights(tokens * k);
    for (int64_t i = 0; i < tokens * k; i++) {
        token[i] = int32_t(grouped.order[i] / k);
        token_weights[i] = weights[grouped.order[i]];
    }
    std::vector<Expert> used = grouped.experts(records, stride, format, hidden, intermediate);
    for (Expert& expert : used) {
        expert.tokens = token.data() + expert.slot;
        expert.weights = token_weights.data() + expert.slot;
    }
    mixture(x, tokens, used, y, tokens);
}

API void dsv2_expert_outputs(const float* x, int64_t x_rows, const uint8_t* records, int64_t stride, int64_t slots,
                             int32_t format, int64_t hidden, int64_t intermediate, const int64_t* tokens,
                             const int64_t* slot, int64_t pairs, float* y) {
    if (!pairs) return;
    const Grouped grouped(slot, pairs, slots);
    std::vector<int32_t> token(pairs);
    for (int64_t i = 0; i < pairs; i++) token[i] = int32_t(tokens[grouped.order[i]]);
    std::vector<Expert> used = grouped.experts(records, stride, format, hidden, intermediate);
    for (Expert& expert : used) {
        expert.tokens = token.data() + expert.slot;
        expert.rows = grouped.order.data() + expert.slot;
    }
    mixture(x, x_rows, used, y, pairs);
}

API void dsv2_combine(const float* outputs, int64_t tokens, int64_t k, int64_t size, const int64_t* rows,
                      const int64_t* ids, const float* weights, float* y) {
    each_row(tokens, [&](int64_t t) {
        float* to = y + t * size;
        thread_local std::vector<int64_t> order;
        order.clear();
        for (int64_t i = t * k; i < (t + 1) * k; i++)
            if (rows[i] >= 0) order.push_back(i);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
        for (const int64_t i : order) {
            const float* from = outputs + rows[i] * size;
            const Vec weight = splat(weights[i]);
            for (int64_t at = 0; at < size; at += LANES) {
                const Vec sum = fma(load_lanes(from + at, size - at), weight, load_lanes(to + at, size - at));
                store_lanes(to + at, sum, size - at);
            }
        }
    });
}

API uint64_t dsv2_read(const uint8_t* data, int64_t nbytes) {
    typedef uint64_t Long __attribute__((vector_size(LANES * 4)));
    constexpr int64_t CHUNK = 1 << 20, STRIDE = 4 * sizeof(Long);
    std::vector<uint64_t> sums(ceil_div(nbytes, CHUNK));
    parallel(int64_t(sums.size()), [&](int64_t i) {
        const uint8_t* p = data + i * CHUNK;
        const int64_t n = std::min(CHUNK, nbytes - i * CHUNK) / STRIDE * STRIDE;
        Long total[4] = {};
        for (int64_t at = 0; at < n; at += STRIDE)
            for (int k = 0; k < 4; k++) {
                Long v;
                std::memcpy(&v, p + at + k * sizeof v, sizeof v);
                total[k] += v;
            }
        const Long all = total[0] + total[1] + total[2] + total[3];
        for (size_t k = 0; k < sizeof(Long) / 8; k++) sums[i] += all[k];
    });
    uint64_t total = 0;
    for (uint64_t s : sums) total += s;
    return total;
}
