#include "runtime/source_tree.h"

#include <algorithm>
#include <filesystem>
#include <mutex>
#include <optional>
#include <system_error>

#include "runtime/settings.h"
#include "runtime/sha256.h"
#include "runtime/whole_file.h"

namespace jax_flash_attn::runtime {
namespace {

namespace fs = std::filesystem;

Status unreadable(const fs::path& path, const std::string& reason) {
  return Status::failed_precondition("The kernel sources cannot be read: " + path.string() + ": " +
                                     reason + ". Reinstall jax_flash_attn.");
}

StatusOr<std::string> read_text(const fs::path& path) {
  std::optional<std::string> text = read_whole_file(path.string());
  if (!text) return unreadable(path, "read error");
  return std::move(*text);
}

StatusOr<std::vector<fs::path>> source_paths(const fs::path& directory) {
  std::vector<fs::path> paths;
  std::error_code error;
  fs::recursive_directory_iterator entry(directory, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    const std::string extension = entry->path().extension().string();
    if (extension == ".h" || extension == ".cuh") paths.push_back(entry->path());
  }
  if (error) return unreadable(directory, error.message());
  if (paths.empty()) return unreadable(directory, "no .h or .cuh file in it");
  return paths;
}

StatusOr<std::shared_ptr<const SourceTree>> read_source_tree(const fs::path& directory) {
  JFA_ASSIGN_OR_RETURN(const std::vector<fs::path> paths, source_paths(directory));
  auto tree = std::make_shared<SourceTree>();
  for (const fs::path& path : paths) {
    JFA_ASSIGN_OR_RETURN(std::string text, read_text(path));
    tree->files.push_back({path.lexically_relative(directory).generic_string(), std::move(text)});
  }
  std::sort(tree->files.begin(), tree->files.end(),
            [](const auto& left, const auto& right) { return left.name < right.name; });
  Sha256 digest;
  for (const SourceTree::File& file : tree->files) {
    digest.update_field(file.name);
    digest.update_field(file.text);
  }
  tree->hash = digest.finish_hex();
  return std::shared_ptr<const SourceTree>(std::move(tree));
}

// The tree last read, and where from.
struct Memory {
  std::mutex mutex;
  std::string directory;
  std::shared_ptr<const SourceTree> tree;
};

}  // namespace

StatusOr<std::shared_ptr<const SourceTree>> source_tree() {
  static auto& memory = *new Memory();  // leaked, like all state of the runtime
  const std::string& directory = settings().kernel_directory;
  std::lock_guard<std::mutex> lock(memory.mutex);
  if (memory.tree == nullptr || memory.directory != directory) {
    JFA_ASSIGN_OR_RETURN(memory.tree, read_source_tree(directory));
    memory.directory = directory;
  }
  return memory.tree;
}

}  // namespace jax_flash_attn::runtime
