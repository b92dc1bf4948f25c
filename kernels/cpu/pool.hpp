// One pool of threads for all kernels.
//
// A parallel call is a number of items of which threads claim ranges; the caller claims them too. It ends when all
// items are done, not when all threads have arrived, so that a thread which the machine has no time for costs nothing:
// on a busy machine the caller does the work alone.
#pragma once

#include <cstdint>

namespace dsv2 {

// Replace the pool: `count` threads with the caller; thread i > 0 is pinned to cpus[i] unless `cpus` is null.
void set_threads(int count, const int32_t* cpus);

// How much of its even share of what is left a thread claims at once. Memory is read fastest in few long runs; where
// arithmetic is the work, and items differ, small claims end together.
enum class Claim { WHOLE = 1, QUARTER = 4 };

// Call fn(context, from, to) until every item in [0, items) was in a range; returns when all are done. Calls from several
// threads take turns.
void run(int64_t items, Claim claim, void (*fn)(const void*, int64_t, int64_t), const void* context);

// fn(from, to): many items at a time at first, one by one in the end.
template <class F>
void parallel_ranges(int64_t items, Claim claim, const F& fn) {
    const auto call = [](const void* context, int64_t from, int64_t to) { (*static_cast<const F*>(context))(from, to); };
    run(items, claim, call, &fn);
}

template <class F>
void parallel(int64_t items, const F& fn, Claim claim = Claim::QUARTER) {
    parallel_ranges(items, claim, [&](int64_t from, int64_t to) {
        for (int64_t item = from; item < to; item++) fn(item);
    });
}

}  // namespace dsv2
