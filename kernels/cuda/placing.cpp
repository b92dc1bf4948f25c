// Places one token's experts between two CUDA graphs of a decode step: what `offload/graph_experts.py: GraphExperts` does
// in Python, for steps of milliseconds in which Python's 0.15 ms a layer would count.
//
// The structs are declared again in `offload/native_placing.py`; tests compare the cache's state with that of
// `offload/expert_cache.py: ExpertCache`, whose arrays this file reads and writes.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "driver.hpp"

namespace dsv2 {

constexpr int32_t NOBODY = -1;
constexpr int MAX_CHOSEN = 64;  // experts per token
enum Policy : int32_t { LRU, LFU, LFU_AGEING, LRFU };

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
        counts[3 * layer + 2]++;
        return at;
    }
};

// See dsv2_expert_outputs in kernels/cpu/api.hpp.
typedef void (*ExpertOutputs)(const float* x, int64_t x_rows, const uint8_t* records, int64_t stride, int64_t slots,
                              int32_t format, int64_t hidden, int64_t intermediate, const int64_t* tokens,
                              const int64_t* slot, int64_t pairs, float* y);

// Seconds; `balance.Costs` without what further tokens cost.
struct Costs {
    double fetch, read, start;
};

// What was done since Python read these counters last.
struct Done {
    int64_t fetched, on_host;
    double fetch_seconds, fetch_expected, host_seconds, host_expected;
};

// A device's experts. `GraphBuffers` has the tensors from `ids` to `outputs`; `outputs` is its part for the CPU.
struct Experts {
    const Driver* driver;
    void* context;
    void* copies;  // the stream of copies
    void* copy_start;
    void* copy_end;
    uint64_t records;
    int64_t nbytes;
    int64_t chosen, hidden, intermediate;
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
    int32_t format;
    int32_t stream_all;  // copy every missing expert
    // Between the two calls of a layer.
    int64_t fetched, on_host;
    int64_t host_experts[MAX_CHOSEN];
    int32_t copies_timed;  // whether the events of the last copies have not been read yet
};

struct Layer {
    Experts* experts;
    int64_t number;
    const uint8_t* records;
    int64_t count;
};

namespace {

// How many of `missing` experts to copy; see `balance.divide`.
int64_t divide(int64_t missing, const Costs& costs) {
    double host = 0;
    for (int64_t i = 0; i < missing; i++) host += costs.read;
    double best = missing ? costs.start + host : 0;
    int64_t fetched = 0;
    for (int64_t number = 1; number <= missing; number++) {
        host -= costs.read;
        const double longer = std::max(double(number) * costs.fetch, number < missing ? costs.start + host : 0.0);
        if (longer < best) {
            best = longer;
            fetched = number;
        }
    }
    return fetched;
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

    int64_t* const hit = e.slot_table;
    int64_t* const copied = hit + K;
    int64_t* const row = copied + K;
    int64_t ascending[MAX_CHOSEN], missing[MAX_CHOSEN];  // positions among the K
    for (int64_t i = 0; i < K; i++) {
        ascending[i] = row[i] = i;
        hit[i] = copied[i] = NOBODY;
    }
    const auto by_number = [&](int64_t a, int64_t b) { return e.ids[a] < e.ids[b]; };
    std::sort(ascending, ascending + K, by_number);
    cache.steps[layer.number]++;
    int64_t misses = 0;
    for (int64_t i = 0; i < K; i++) {
        const int64_t at = ascending[i], key = first + e.ids[at];
        cache.count_use(key, layer.number);
        if (cache.slot[key] == NOBODY) {
            missing[misses++] = at;
        } else {
            hit[at] = cache.slot[key];
            cache.hold(key, cache.slot[key]);
        }
    }
    cache.counts[3 * layer.number] += K - misses;
    cache.counts[3 * layer.number + 1] += misses;

    e.fetched = misses;
    if (!e.stream_all) {
        // Those of most worth to the cache are copied.
        std::sort(missing, missing + misses,
                  [&](int64_t a, int64_t b) { return cache.less(first + e.ids[b], first + e.ids[a]); });
        e.fetched = divide(misses, e.costs);
        std::sort(missing, missing + e.fetched, by_number);
        std::sort(missing + e.fetched, missing + misses);
    }
    if (e.fetched) DRIVER_CALL(e.driver->record(e.copy_start, e.copies));
    int64_t staging = cache.slots;
    for (int64_t i = 0; i < e.fetched; i++) {
        const int64_t expert = e.ids[missing[i]];
        const int32_t slot = cache.admit(first + expert, layer.number);
        const int64_t index = copied[missing[i]] = slot == NOBODY ? staging++ : slot;
        DRIVER_CALL(e.driver->copy_to_device(e.records + uint64_t(index * e.nbytes), layer.records + expert * e.nbytes,
                                             size_t(e.nbytes), e.copies));
    }
    if (e.fetched) {
        DRIVER_CALL(e.driver->record(e.copy_end, e.copies));
        e.copies_timed = 1;
        e.done.fetched += e.fetched;
        e.done.fetch_expected += double(e.fetched) * e.costs.fetch;
    }
    e.on_host = misses - e.fetched;
    for (int64_t i = 0; i < e.on_host; i++) {
        const int64_t at = missing[e.fetched + i];
        e.host_experts[i] = e.ids[at];
        row[at] = K + i;
    }
    return e.driver->copy_to_device(e.sent, e.slot_table, size_t(3 * K) * sizeof(int64_t), stream);
}

// Make the stream wait for the copies, and compute the remaining experts on the CPU.
API int32_t dsv2_finish(void* argument, void* stream) {
    using namespace dsv2;
    typedef std::chrono::steady_clock Clock;
    static const int64_t token[MAX_CHOSEN] = {};
    const Layer& layer = *static_cast<const Layer*>(argument);
    Experts& e = *layer.experts;
    DRIVER_CALL(e.driver->set_context(e.context));
    if (e.fetched) DRIVER_CALL(e.driver->wait(stream, e.copy_end, 0));
    if (!e.on_host) return 0;
    const auto start = Clock::now();
    e.expert_outputs(e.x, 1, layer.records, e.nbytes, layer.count, e.format, e.hidden, e.intermediate, token,
                     e.host_experts, e.on_host, e.host_outputs);
    e.done.host_seconds += std::chrono::duration<double>(Clock::now() - start).count();
    e.done.host_expected += e.costs.start + double(e.on_host) * e.costs.read;
    e.done.on_host += e.on_host;
    return e.driver->copy_to_device(e.outputs, e.host_outputs, size_t(e.on_host * e.hidden) * sizeof(float), stream);
}
