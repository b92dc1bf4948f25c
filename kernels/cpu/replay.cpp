// Replays a recorded decode step: repeats the kernel calls that Python made once, without running Python between them.
#include <chrono>
#include <iterator>
#include <utility>

#include "api.hpp"

namespace dsv2 {
namespace {

template <class T>
T argument(uint64_t word) {
    T value;
    static_assert(sizeof value <= sizeof word);
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <class... A, size_t... I>
void spread(void (*function)(A...), const uint64_t* words, std::index_sequence<I...>) {
    static_assert(sizeof...(A) <= CALL_ARGUMENTS);
    function(argument<A>(words[I])...);
}

template <class... A>
void spread(void (*function)(A...), const uint64_t* words) {
    spread(function, words, std::index_sequence_for<A...>());
}

template <auto FUNCTION>
void call(const uint64_t* words) {
    spread(FUNCTION, words);
}

struct Recordable {
    const char* name;
    void (*call)(const uint64_t* words);
};

// The functions that can be recorded, the only list of them: `recording.py` reads the names through dsv2_recordable,
// and Call::function is an index into it.
#define RECORDABLE(name) {#name, call<dsv2_##name>}
constexpr Recordable FUNCTIONS[] = {
    RECORDABLE(linear), RECORDABLE(swiglu), RECORDABLE(experts), RECORDABLE(attention), RECORDABLE(rms_norm),
    RECORDABLE(latents), RECORDABLE(route), RECORDABLE(embedding), RECORDABLE(add),
};
#undef RECORDABLE

}  // namespace
}  // namespace dsv2

API const char* dsv2_recordable(int64_t function) {
    return function < int64_t(std::size(dsv2::FUNCTIONS)) ? dsv2::FUNCTIONS[function].name : nullptr;
}

API void dsv2_replay(const dsv2::Call* calls, int64_t count, double* seconds) {
    typedef std::chrono::steady_clock Clock;
    for (int64_t i = 0; i < count; i++) {
        const auto start = seconds ? Clock::now() : Clock::time_point();
        dsv2::FUNCTIONS[calls[i].function].call(calls[i].arguments);
        if (seconds) seconds[i] += std::chrono::duration<double>(Clock::now() - start).count();
    }
}
