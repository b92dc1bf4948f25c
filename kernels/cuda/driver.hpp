// The functions of the CUDA driver that native code calls, as addresses: nothing is linked against CUDA, and tests pass
// functions of their own. `__init__.py` fills the table from libcuda.so.1.
#pragma once

#include <cstddef>
#include <cstdint>

#define API extern "C" __attribute__((visibility("default")))

namespace dsv2 {

// Every function returns 0, or a CUresult.
struct Driver {
    int32_t (*set_context)(void* context);
    int32_t (*launch_graph)(void* graph, void* stream);
    int32_t (*synchronize)(void* stream);
    int32_t (*copy_to_device)(uint64_t target, const void* source, size_t nbytes, void* stream);
    int32_t (*record)(void* event, void* stream);
    int32_t (*wait)(void* stream, void* event, uint32_t flags);
    int32_t (*elapsed)(float* milliseconds, void* start, void* end);
};

// Return from the calling function if a driver call fails.
#define DRIVER_CALL(call)                 \
    do {                                  \
        if (const int32_t code = (call)) return code; \
    } while (0)

}  // namespace dsv2
