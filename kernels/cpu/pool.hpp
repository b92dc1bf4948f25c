// The thread pool of all kernels.
//
// A parallel call is a number of items. The worker threads and the caller claim ranges of them until none is left. The
// call returns when all items are done, not when all threads have taken part, so that a thread which is not scheduled
// delays nothing: on a busy machine the caller does all the work itself.
#pragma once

#include <cstdint>

namespace dsv2 {

// Replace the pool by one of `count` threads, the caller among them; thread i > 0 is pinned to cpus[i] unless `cpus` is
// null.
void set_threads(int count, const int32_t* cpus);

// Let an idle thread spin this long before it sleeps.
void set_spin(int64_t microseconds);

// How much a thread claims at once: all of its even share of the remaining items, or a quarter of it. Memory is read
// fastest in few long runs; when arithmetic limits the speed and items differ, small claims let all threads finish
// together.
enum class Claim { WHOLE = 1, QUARTER = 4 };

// Call fn(context, from, to) on ranges that cover [0, items); returns when all are done. Calls from several threads run
// one after the other.
void run(int64_t items, Claim claim, void (*fn)(const void*, int64_t, int64_t), const void* context);

// Call fn(from, to) on ranges that cover [0, items): long ranges at first, single items at the end.
template <class F>
void parallel_ranges(int64_t items, Claim claim, const F& fn) {
    const auto call = [](const void* context, int64_t from, int64_t to) { (*static_cast<const F*>(context))(from, to); };
    run(items, claim, call, &fn);
}

// Call fn(item) for every item in [0, items).
template <class F>
void parallel(int64_t items, const F& fn, Claim claim = Claim::QUARTER) {
    parallel_ranges(items, claim, [&](int64_t from, int64_t to) {
        for (int64_t item = from; item < to; item++) fn(item);
    });
}

}  // namespace dsv2
