// Whole files in one read or write, by C stdio.
//
// Nothing here, or anywhere in csrc, uses C++ streams: some toolchains link libstdc++ statically,
// and the locale tables of two copies in one process do not agree, which crashes the first
// formatted number.
#pragma once

#include <optional>
#include <string>

namespace jax_flash_attn::runtime {

// The content of a file, or none where it cannot be read.
std::optional<std::string> read_whole_file(const std::string& path);

// Replaces the content of a file. False where that failed.
bool write_whole_file(const std::string& path, const std::string& content);

}  // namespace jax_flash_attn::runtime
