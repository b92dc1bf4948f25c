// The entry points are plain C over raw pointers: no type of torch or Python crosses.
#pragma once

#define API extern "C" __attribute__((visibility("default")))
