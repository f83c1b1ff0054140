// XLA's FFI header, with the version that our handlers report pinned to the oldest one.
//
// XLA refuses a handler that reports a newer API version than its own, and then cannot initialise
// the backend at all. Nothing used here changed its layout from 0.1 to 0.5, so a handler that
// reports 0.1 runs on jaxlib 0.8 and later, whichever jaxlib it was built against.
#pragma once

#include "xla/ffi/api/c_api.h"
#undef XLA_FFI_API_MINOR
#define XLA_FFI_API_MINOR 1
#include "xla/ffi/api/ffi.h"
