// Places the experts of few tokens between two CUDA graphs of a decode step: what `offload/graph_experts.py:
// GraphExperts` does in Python, for steps of milliseconds in which Python's 0.15 ms a layer would count.
//
// The structs are declared again in `offload/native_placing.py`; tests compare the cache's state with that of
// `offload/expert_cache.py: ExpertCache`, whose arrays this file reads and writes.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>

#include "driver.hpp"

namespace dsv2 {

constexpr int32_t NOBODY = -1;
constexpr int MAX_PAIRS = 1024;  // token-expert pairs of a step
enum Policy : int32_t { LRU, LFU, LFU_AGEING, LRFU };
enum Count { HITS, MISSES, FETCHES, COPIES, ON_HOST, COUNTS };  // columns of `ExpertCache.counts`

// The arrays of `ExpertCache`. A key is the number of an expert, counted over all layers.
struct Cache {
    int64_t slots, experts;
    double half_life;
    int32_t* slot;
    double* worth;
    int64_t* used;
    int64_t* steps;
    int64_t* counts;
    int32_t* owner;
    double* slot_worth;
    uint8_t* pinned;
    int32_t* free;
    int64_t* free_count;
    int64_t* clock;
    double* age;
    int32_t policy;

    void hold(int64_t key, int32_t at) {
        slot_worth[at] = worth[key];
        pinned[at] = 1;
    }

    void count_use(int64_t key, int64_t layer) {
        const double before = worth[key];
        used[key] = ++*clock;
        if (policy == LRU) {
            worth[key] = 0;
        } else if (policy == LRFU) {
            const double now = double(steps[layer]) / half_life;
            worth[key] = std::max(before, now) + std::log2(1 + std::pow(2.0, -std::fabs(before - now)));
        } else {
            worth[key] = std::max(before, policy == LFU_AGEING ? *age : 0.0) + 1;
        }
    }

    // Whether the expert a is worth less than b.
    bool less(int64_t a, int64_t b) const {
        return worth[a] != worth[b] ? worth[a] < worth[b] : used[a] < used[b];
    }

    // The slot whose expert is to be evicted for `newcomer`; NOBODY if there is none.
    int32_t victim(int64_t newcomer) {
        int32_t found = NOBODY;
        double least = std::numeric_limits<double>::infinity();
        for (int64_t at = 0; at < slots; at++) {
            if (slot_worth[at] > least || pinned[at] || owner[at] == NOBODY) continue;
            if (slot_worth[at] < least || less(owner[at], owner[found])) {
                least = slot_worth[at];
                found = int32_t(at);
            }
        }
        if (found == NOBODY || (policy == LRFU && less(newcomer, owner[found]))) return NOBODY;
        *age = least;
        return found;
    }

    // Assign a slot to a missing expert and pin it; NOBODY if there is none for it.
    int32_t admit(int64_t key, int64_t layer) {
        int32_t at;
        if (*free_count) {
            at = free[--*free_count];
        } else {
            at = victim(key);
            if (at == NOBODY) return NOBODY;
            slot[owner[at]] = NOBODY;
        }
        slot[key] = at;
        owner[at] = int32_t(key);
        hold(key, at);
        counts[COUNTS * layer + FETCHES]++;
        return at;
    }
};

// See dsv2_expert_outputs in kernels/cpu/api.hpp.
typedef void (*ExpertOutputs)(const float* x, int64_t x_rows, const uint8_t* records, int64_t stride, int64_t slots,
                              int32_t format, int64_t hidden, int64_t intermediate, const int64_t* tokens,
                              const int64_t* slot, int64_t pairs, float* y);

// `balance.Costs`, in seconds.
struct Costs {
    double fetch, read, token, start;

    // To compute an expert on the CPU for this many tokens.
    double host(int64_t tokens) const { return read + double(tokens - 1) * token; }
};

// What was done since Python read these counters last.
struct Done {
    int64_t fetched, on_host;
    double fetch_seconds, fetch_expected, host_seconds, host_expected;
};

// A device's experts. `GraphBuffers` has the tensors from `ids` to `outputs`, of which a step uses the beginning.
struct Experts {
    const Driver* driver;
    void* context;
    void* copies;  // the stream of copies
    void* copy_start;
    void* copy_end;
    uint64_t records;
    int64_t nbytes;
    int64_t chosen, hidden, intermediate;  // experts per token, and sizes of an expert
    const int64_t* ids;
    const float* x;
    int64_t* slot_table;
    uint64_t sent;
    float* host_outputs;
    uint64_t outputs;
    ExpertOutputs expert_outputs;
    Cache cache;
    Costs costs;
    Done done;
    int64_t staged;  // experts that the staging buffers hold
    int32_t format;
    int32_t stream_all;  // copy every missing expert
    // Between the two calls of a layer: experts copied, experts of the CPU, and the latter's pairs and expected seconds.
    int64_t fetched, on_host, host_pairs;
    double host_cost;
    int64_t host_tokens[MAX_PAIRS], host_experts[MAX_PAIRS];
    int32_t copies_timed;  // whether the events of the last copies have not been read yet
};

struct Layer {
    Experts* experts;
    int64_t number;
    const uint8_t* records;
    int64_t count;
    int64_t tokens;  // of the step
};

// An expert that some tokens chose: `count` successive pairs.
struct Chosen {
    int64_t expert;
    const int64_t* pairs;
    int64_t count;
};

namespace {

// How many of the missing experts to copy, from the front; see `balance.divide`.
int64_t divide(const Chosen* missing, int64_t misses, const Costs& costs) {
    double host = 0;
    for (int64_t i = 0; i < misses; i++) host += costs.host(missing[i].count);
    double best = misses ? costs.start + host : 0;
    int64_t fetched = 0;
    for (int64_t number = 1; number <= misses; number++) {
        host -= costs.host(missing[number - 1].count);
        const double longer = std::max(double(number) * costs.fetch, number < misses ? costs.start + host : 0.0);
        if (longer < best) {
            best = longer;
            fetched = number;
        }
    }
    return fetched;
}

// Whether a token has the same input and experts as the one before it, as the rows have that pad a batch.
bool like_before(const Experts& e, int64_t token) {
    if (!token) return false;
    const int64_t* before = e.ids + (token - 1) * e.chosen;
    const float* x = e.x + (token - 1) * e.hidden;
    return std::equal(before, before + e.chosen, before + e.chosen) &&
           !std::memcmp(x, x + e.hidden, size_t(e.hidden) * sizeof(float));
}

// Read how long the last copies took, which are done.
int32_t settle(Experts& e) {
    if (!e.copies_timed) return 0;
    float milliseconds = 0;
    DRIVER_CALL(e.driver->elapsed(&milliseconds, e.copy_start, e.copy_end));
    e.done.fetch_seconds += double(milliseconds) / 1e3;
    e.copies_timed = 0;
    return 0;
}

}  // namespace
}  // namespace dsv2

// Wait for the router, decide where each expert is computed, start the copies and send the table of slots.
API int32_t dsv2_place(void* argument, void* stream) {
    using namespace dsv2;
    const Layer& layer = *static_cast<const Layer*>(argument);
    Experts& e = *layer.experts;
    Cache& cache = e.cache;
    const int64_t K = e.chosen, first = layer.number * cache.experts;
    DRIVER_CALL(e.driver->set_context(e.context));
    DRIVER_CALL(e.driver->synchronize(stream));  // waits for all earlier work and copies: nothing reads a slot now
    DRIVER_CALL(settle(e));
    std::fill(cache.pinned, cache.pinned + cache.slots, uint8_t(0));

    const int64_t tokens = layer.tokens, all = tokens * K;  // pairs
    int64_t* const hit = e.slot_table;
    int64_t* const copied = hit + all;
    int64_t* const row = copied + all;
    int64_t pairs[MAX_PAIRS], count = 0;  // of tokens unlike the one before, sorted by expert
    bool repeated[MAX_PAIRS];
    for (int64_t t = 0; t < tokens; t++) {
        repeated[t] = like_before(e, t);
        for (int64_t i = t * K; i < t * K + K; i++) {
            row[i] = i;
            hit[i] = copied[i] = NOBODY;
            if (!repeated[t]) pairs[count++] = i;
        }
    }
    std::sort(pairs, pairs + count, [&](int64_t a, int64_t b) {
        return e.ids[a] != e.ids[b] ? e.ids[a] < e.ids[b] : a < b;
    });

    cache.steps[layer.number]++;
    Chosen missing[MAX_PAIRS];
    int64_t misses = 0, hits = 0;
    for (int64_t i = 0, next; i < count; i = next) {
        const int64_t expert = e.ids[pairs[i]], key = first + expert;
        for (next = i + 1; next < count && e.ids[pairs[next]] == expert;) next++;
        cache.count_use(key, layer.number);
        if (cache.slot[key] == NOBODY) {
            missing[misses++] = {expert, pairs + i, next - i};
            continue;
        }
        hits++;
        for (int64_t at = i; at < next; at++) hit[pairs[at]] = cache.slot[key];
        cache.hold(key, cache.slot[key]);
    }
    int64_t* const counts = cache.counts + COUNTS * layer.number;
    counts[HITS] += hits;
    counts[MISSES] += misses;

    e.fetched = misses;
    if (!e.stream_all || misses > e.staged) {
        // Those of the most tokens, and then those of most worth to the cache, are copied.
        std::sort(missing, missing + misses, [&](const Chosen& a, const Chosen& b) {
            return a.count != b.count ? a.count > b.count : cache.less(first + b.expert, first + a.expert);
        });
        if (!e.stream_all) e.fetched = divide(missing, misses, e.costs);
        e.fetched = std::min(e.fetched, e.staged);
        std::sort(missing, missing + e.fetched, [](const Chosen& a, const Chosen& b) { return a.expert < b.expert; });
    }
    if (e.fetched) DRIVER_CALL(e.driver->record(e.copy_start, e.copies));
    int64_t staging = cache.slots;
    for (int64_t i = 0; i < e.fetched; i++) {
        const Chosen& chosen = missing[i];
        const int32_t slot = cache.admit(first + chosen.expert, layer.number);
        const int64_t index = slot == NOBODY ? staging++ : slot;
        for (int64_t at = 0; at < chosen.count; at++) copied[chosen.pairs[at]] = index;
        DRIVER_CALL(e.driver->copy_to_device(e.records + uint64_t(index * e.nbytes),
                                             layer.records + chosen.expert * e.nbytes, size_t(e.nbytes), e.copies));
    }
    if (e.fetched) {
        DRIVER_CALL(e.driver->record(e.copy_end, e.copies));
        e.copies_timed = 1;
        e.done.fetched += e.fetched;
        e.done.fetch_expected += double(e.fetched) * e.costs.fetch;
    }

    counts[COPIES] += e.fetched;

    e.on_host = misses - e.fetched;
    counts[ON_HOST] += e.on_host;
    e.host_cost = e.costs.start;
    e.host_pairs = 0;
    int64_t on_host[MAX_PAIRS];
    for (int64_t i = e.fetched; i < misses; i++) {
        std::copy(missing[i].pairs, missing[i].pairs + missing[i].count, on_host + e.host_pairs);
        e.host_pairs += missing[i].count;
        e.host_cost += e.costs.host(missing[i].count);
    }
    std::sort(on_host, on_host + e.host_pairs);
    for (int64_t i = 0; i < e.host_pairs; i++) {
        e.host_tokens[i] = on_host[i] / K;
        e.host_experts[i] = e.ids[on_host[i]];
        row[on_host[i]] = all + i;
    }
    for (int64_t t = 1; t < tokens; t++)
        if (repeated[t]) std::copy(row + t * K - K, row + t * K, row + t * K);
    return e.driver->copy_to_device(e.sent, e.slot_table, size_t(3 * all) * sizeof(int64_t), stream);
}

// Make the stream wait for the copies, and compute the remaining experts on the CPU.
API int32_t dsv2_finish(void* argument, void* stream) {
    using namespace dsv2;
    typedef std::chrono::steady_clock Clock;
    const Layer& layer = *static_cast<const Layer*>(argument);
    Experts& e = *layer.experts;
    DRIVER_CALL(e.driver->set_context(e.context));
    if (e.fetched) DRIVER_CALL(e.driver->wait(stream, e.copy_end, 0));
    if (!e.on_host) return 0;
    const auto start = Clock::now();
    e.expert_outputs(e.x, layer.tokens, layer.records, e.nbytes, layer.count, e.format, e.hidden, e.intermediate,
                     e.host_tokens, e.host_experts, e.host_pairs, e.host_outputs);
    e.done.host_seconds += std::chrono::duration<double>(Clock::now() - start).count();
    e.done.host_expected += e.host_cost;
    e.done.on_host += e.on_host;
    const uint64_t target = e.outputs + uint64_t(layer.tokens * e.chosen * e.hidden) * sizeof(float);
    return e.driver->copy_to_device(target, e.host_outputs, size_t(e.host_pairs * e.hidden) * sizeof(float), stream);
}
