// Replays a piecewise CUDA graph: launches its graphs and makes the native calls between them, without Python.
#include "driver.hpp"

namespace dsv2 {

// A function to call on a stream, with its argument.
struct Call {
    int32_t (*function)(void* argument, void* stream);
    void* argument;
};

// The argument of dsv2_launch: an instantiated graph.
struct Launch {
    const Driver* driver;
    void* context;
    void* graph;
};

}  // namespace dsv2

API int32_t dsv2_launch(void* argument, void* stream) {
    const auto& launch = *static_cast<const dsv2::Launch*>(argument);
    DRIVER_CALL(launch.driver->set_context(launch.context));
    return launch.driver->launch_graph(launch.graph, stream);
}

// Make the calls in order; returns the first result that is not 0, after which no call is made.
API int32_t dsv2_replay(const dsv2::Call* calls, int64_t count, void* stream) {
    for (int64_t i = 0; i < count; i++) DRIVER_CALL(calls[i].function(calls[i].argument, stream));
    return 0;
}
