#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dsv2 {
namespace {

// How long an idle worker spins before it sleeps: longer than the pause between two kernels of a decode step.
std::atomic<int64_t> spin_microseconds{200};

// The state of a parallel call in one word, so that a claim cannot hit a later call than the one that was read: the
// number of the call (16 bits), its items (24 bits) and the next item to be claimed (24 bits).
constexpr int FIELD = 24;
constexpr uint64_t MASK = (uint64_t(1) << FIELD) - 1;

inline uint64_t items_of(uint64_t ticket) { return ticket >> FIELD & MASK; }
inline uint64_t next_of(uint64_t ticket) { return ticket & MASK; }

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

class Pool {
  public:
    ~Pool() { stop(); }

    void resize(int count, const int32_t* cpus) {
        std::lock_guard<std::mutex> turn(turn_);
        stop();
        stopping_ = false;
        for (int i = 1; i < count; i++) {
            workers_.emplace_back([this] { work(); });
            if (cpus) pin(workers_.back(), cpus[i]);
        }
    }

    void run(int64_t items, Claim claim, void (*fn)(const void*, int64_t, int64_t), const void* context) {
        if (items <= 0) return;
        std::lock_guard<std::mutex> turn(turn_);
        if (items > int64_t(MASK)) {  // more than a ticket can count: the caller computes the rest
            fn(context, MASK, items);
            items = MASK;
        }
        if (workers_.empty() || items == 1) return fn(context, 0, items);
        fn_ = fn;
        context_ = context;
        divisor_.store(uint64_t(claim) * (workers_.size() + 1), std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        const uint64_t call = (ticket_.load(std::memory_order_relaxed) >> 2 * FIELD) + 1;
        ticket_.store(call << 2 * FIELD | uint64_t(items) << FIELD, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst)) wake();
        while (work_on()) {
        }
        for (int spins = 0; done_.load(std::memory_order_acquire) < items; spins++) {
            if (spins < 20000) pause();
            else sched_yield();  // the thread with the last item may be waiting for this core
        }
    }

  private:
    // Claim and compute some items; returns whether there were any. Claims are large at first, since each moves a cache
    // line between cores, and single items at the end, so that all threads finish together.
    bool work_on() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire), count;
        do {
            if (next_of(ticket) >= items_of(ticket)) return false;
            count = std::max<uint64_t>(1, (items_of(ticket) - next_of(ticket)) / divisor_.load(std::memory_order_relaxed));
        } while (!ticket_.compare_exchange_weak(ticket, ticket + count, std::memory_order_acq_rel));
        // The call cannot end before the claimed items are done, so fn_ and context_ are still those of this call.
        fn_(context_, int64_t(next_of(ticket)), int64_t(next_of(ticket) + count));
        done_.fetch_add(int64_t(count), std::memory_order_release);
        return true;
    }

    void work() {
        while (!stopping_.load(std::memory_order_acquire)) {
            while (work_on()) {
            }
            const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(spin_microseconds.load(std::memory_order_relaxed));
            while (!available() && std::chrono::steady_clock::now() < until)
                for (int i = 0; i < 20; i++) pause();
            if (!available()) sleep();
        }
    }

    bool available() const {
        const uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
        return next_of(ticket) < items_of(ticket) || stopping_.load(std::memory_order_acquire);
    }

    void sleep() {
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        awake_.wait(lock, [this] { return available(); });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }

    void wake() {
        std::lock_guard<std::mutex> lock(sleep_);
        awake_.notify_all();
    }

    void stop() {
        stopping_ = true;
        wake();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
    }

    static void pin(std::thread& thread, int cpu) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);  // if this fails, the thread stays unpinned
    }

    std::mutex turn_, sleep_;
    std::condition_variable awake_;
    std::vector<std::thread> workers_;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::atomic<bool> stopping_{false};
    std::atomic<uint64_t> divisor_{1};  // a claim is the remaining items divided by this
    void (*fn_)(const void*, int64_t, int64_t) = nullptr;
    const void* context_ = nullptr;
};

// Never destroyed, since a worker may still be asleep when the process exits.
Pool& pool() {
    static Pool& instance = *new Pool;
    return instance;
}

}  // namespace

void set_threads(int count, const int32_t* cpus) { pool().resize(count, cpus); }
void set_spin(int64_t microseconds) { spin_microseconds.store(microseconds, std::memory_order_relaxed); }
void run(int64_t items, Claim claim, void (*fn)(const void*, int64_t, int64_t), const void* context) {
    pool().run(items, claim, fn, context);
}

}  // namespace dsv2

#include "api.hpp"

API void dsv2_set_threads(int32_t count, const int32_t* cpus) { dsv2::set_threads(count, cpus); }
API void dsv2_set_spin(int64_t microseconds) { dsv2::set_spin(microseconds); }
