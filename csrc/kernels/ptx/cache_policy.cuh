// How long lines should stay in L2 (PTX ISA 9.7.9.1.2, sm_80 and later).
#pragma once

namespace jfa::ptx {

// As createpolicy encodes it for the whole access.
constexpr unsigned long long kEvictFirst = 0x12F0000000000000ull;
constexpr unsigned long long kEvictLast = 0x14F0000000000000ull;

}  // namespace jfa::ptx
