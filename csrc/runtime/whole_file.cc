#include "runtime/whole_file.h"

#include <cstdio>
#include <memory>

namespace jax_flash_attn::runtime {
namespace {

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

constexpr std::size_t kBufferBytes = 1 << 16;

}  // namespace

std::optional<std::string> read_whole_file(const std::string& path) {
  const File file(std::fopen(path.c_str(), "rb"));
  if (file == nullptr) return std::nullopt;
  std::string content;
  std::string buffer(kBufferBytes, '\0');
  while (const std::size_t bytes = std::fread(buffer.data(), 1, buffer.size(), file.get()))
    content.append(buffer, 0, bytes);
  if (std::ferror(file.get())) return std::nullopt;
  return content;
}

bool write_whole_file(const std::string& path, const std::string& content) {
  File file(std::fopen(path.c_str(), "wb"));
  if (file == nullptr) return false;
  const bool written = std::fwrite(content.data(), 1, content.size(), file.get()) == content.size();
  return std::fclose(file.release()) == 0 && written;
}

}  // namespace jax_flash_attn::runtime
