// A decode step as a list: the calls that Python once made, made again without it.
#include <chrono>
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

// In the order of RECORDED in recording.py.
void (*const FUNCTIONS[])(const uint64_t*) = {
    call<dsv2_linear>, call<dsv2_swiglu>, call<dsv2_experts>, call<dsv2_attention>, call<dsv2_rms_norm>,
    call<dsv2_latents>, call<dsv2_route>, call<dsv2_embedding>, call<dsv2_add>,
};

}  // namespace
}  // namespace dsv2

API void dsv2_replay(const dsv2::Call* calls, int64_t count, double* seconds) {
    typedef std::chrono::steady_clock Clock;
    for (int64_t i = 0; i < count; i++) {
        const auto start = seconds ? Clock::now() : Clock::time_point();
        dsv2::FUNCTIONS[calls[i].function](calls[i].arguments);
        if (seconds) seconds[i] += std::chrono::duration<double>(Clock::now() - start).count();
    }
}
