#include "runtime/disk_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <random>
#include <string_view>
#include <system_error>

#include "runtime/settings.h"
#include "runtime/sha256.h"

namespace jax_flash_attn::runtime {
namespace {

constexpr char kSuffix[] = ".cubin";
constexpr std::string_view kMagic = "JFACUBIN";
constexpr std::size_t kLengthDigits = 16;
constexpr std::size_t kDigestDigits = 64;
constexpr std::size_t kHeaderBytes = kMagic.size() + kLengthDigits + kDigestDigits;
constexpr std::size_t kPrefixDigits = 2;
constexpr std::size_t kKeyDigits = 64;

// Owns a file descriptor.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(other.number_) { other.number_ = -1; }
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor() {
    if (number_ >= 0) ::close(number_);
  }

  bool is_open() const { return number_ >= 0; }
  int number() const { return number_; }

  // Closes and tells whether the file system took everything: a quota may fail here only.
  bool close() {
    const int number = number_;
    number_ = -1;
    return ::close(number) == 0;
  }

 private:
  int number_;
};

bool is_private(const struct stat& status) {
  return status.st_uid == ::geteuid() && (status.st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

// Opens a directory that only this user may write, or returns a closed descriptor.
Descriptor open_private_directory(int parent, const char* name, int extra_flags) {
  Descriptor directory(::openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | extra_flags));
  struct stat status = {};
  if (directory.is_open() && ::fstat(directory.number(), &status) == 0 && is_private(status)) {
    return directory;
  }
  return Descriptor(-1);
}

Descriptor open_root() {
  return open_private_directory(AT_FDCWD, settings().cache_directory.c_str(), 0);
}

Descriptor open_subdirectory(const Descriptor& root, const std::string& key_hex) {
  const std::string name = key_hex.substr(0, kPrefixDigits);
  return open_private_directory(root.number(), name.c_str(), O_NOFOLLOW);
}

std::string entry_name(const std::string& key_hex) {
  return key_hex.substr(kPrefixDigits) + kSuffix;
}

bool is_key(const std::string& key_hex) {
  return key_hex.size() == kKeyDigits &&
         key_hex.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::string header(const std::string& key_hex, std::string_view payload) {
  Sha256 digest;
  digest.update(key_hex);  // an entry under another key's name is not valid
  digest.update(payload);
  char length[kLengthDigits + 1];
  std::snprintf(length, sizeof length, "%016llx", static_cast<unsigned long long>(payload.size()));
  return std::string(kMagic) + length + digest.finish_hex();
}

std::optional<std::string> read_all(int file, std::size_t bytes) {
  std::string content(bytes, '\0');
  std::size_t num_read = 0;
  while (num_read < bytes) {
    const ssize_t count = ::read(file, content.data() + num_read, bytes - num_read);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return std::nullopt;
    num_read += static_cast<std::size_t>(count);
  }
  return content;
}

bool write_all(int file, std::string_view content) {
  while (!content.empty()) {
    const ssize_t count = ::write(file, content.data(), content.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    content.remove_prefix(static_cast<std::size_t>(count));
  }
  return true;
}

// Unlike any other writer's name, on this host or another one that shares the directory.
std::string temporary_name(const std::string& key_hex) {
  std::random_device random;
  char unique[17];
  std::snprintf(unique, sizeof unique, "%08x%08x", random(), random());
  return "." + key_hex.substr(kPrefixDigits) + "." + unique;
}

void make_root() {
  std::filesystem::path root(settings().cache_directory);
  if (!root.has_filename()) root = root.parent_path();  // a trailing slash
  std::error_code ignored;
  std::filesystem::create_directories(root.parent_path(), ignored);
  ::mkdir(root.c_str(), S_IRWXU);
}

// The directory, or the nearest one above it that exists.
std::filesystem::path nearest_existing(std::filesystem::path path) {
  std::error_code ignored;
  while (!std::filesystem::exists(path, ignored) && path.has_relative_path()) {
    path = path.parent_path();
  }
  return path.empty() ? "." : path;
}

// Why the cache cannot be used, with the remedy; empty if it can.
std::string reason_disabled(const std::string& directory) {
  if (directory.empty()) return "switched off: JAX_FLASH_ATTN_CACHE_DIR names no directory";
  struct stat status = {};
  if (::stat(directory.c_str(), &status) != 0) {
    const std::filesystem::path parent = nearest_existing(directory);
    std::error_code ignored;
    const bool is_directory = std::filesystem::is_directory(parent, ignored);
    if (is_directory && ::access(parent.c_str(), W_OK) == 0) return "";
    if (!is_directory) errno = ENOTDIR;
    return "cannot be created: " + std::string(std::strerror(errno)) +
           "; set JAX_FLASH_ATTN_CACHE_DIR to a writable place";
  }
  if (!S_ISDIR(status.st_mode)) return "not a directory";
  if (status.st_uid != ::geteuid()) {
    return "owned by user " + std::to_string(status.st_uid) + ", not by " +
           std::to_string(::geteuid()) +
           "; set JAX_FLASH_ATTN_CACHE_DIR to a directory of your own";
  }
  if (!is_private(status)) return "writable by other users; run chmod go-w on it";
  return "";
}

}  // namespace

std::optional<std::string> lookup(const std::string& key_hex) {
  if (settings().cache_directory.empty() || !is_key(key_hex)) return std::nullopt;
  const Descriptor root = open_root();
  if (!root.is_open()) return std::nullopt;
  const Descriptor directory = open_subdirectory(root, key_hex);
  if (!directory.is_open()) return std::nullopt;
  const Descriptor file(::openat(directory.number(), entry_name(key_hex).c_str(),
                                 O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat status = {};
  if (!file.is_open() || ::fstat(file.number(), &status) != 0) return std::nullopt;
  if (!S_ISREG(status.st_mode) || !is_private(status)) return std::nullopt;
  if (status.st_size < static_cast<off_t>(kHeaderBytes)) return std::nullopt;

  const auto content = read_all(file.number(), static_cast<std::size_t>(status.st_size));
  if (!content) return std::nullopt;
  std::string payload = content->substr(kHeaderBytes);
  if (content->compare(0, kHeaderBytes, header(key_hex, payload)) != 0) return std::nullopt;
  return payload;
}

void publish(const std::string& key_hex, const std::string& cubin) {
  if (settings().cache_directory.empty() || !is_key(key_hex)) return;
  make_root();
  const Descriptor root = open_root();
  if (!root.is_open()) return;
  ::mkdirat(root.number(), key_hex.substr(0, kPrefixDigits).c_str(), S_IRWXU);
  const Descriptor directory = open_subdirectory(root, key_hex);
  if (!directory.is_open()) return;

  const std::string temporary = temporary_name(key_hex);
  Descriptor file(::openat(directory.number(), temporary.c_str(),
                           O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                           S_IRUSR | S_IWUSR));
  if (!file.is_open()) return;
  bool is_written = write_all(file.number(), header(key_hex, cubin) + cubin);
  is_written = file.close() && is_written;
  const std::string entry = entry_name(key_hex);
  if (!is_written ||
      ::renameat(directory.number(), temporary.c_str(), directory.number(), entry.c_str()) != 0) {
    ::unlinkat(directory.number(), temporary.c_str(), 0);
  }
}

DiskCacheStats disk_cache_stats() {
  namespace fs = std::filesystem;
  DiskCacheStats stats = {};
  stats.directory = settings().cache_directory;
  stats.reason_disabled = reason_disabled(stats.directory);
  stats.enabled = stats.reason_disabled.empty();
  if (!stats.enabled) return stats;
  std::error_code error;
  fs::recursive_directory_iterator entry(stats.directory, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    if (entry->path().extension() != kSuffix) continue;
    std::error_code vanished;
    const std::uintmax_t bytes = entry->file_size(vanished);
    if (vanished) continue;
    ++stats.entries;
    stats.bytes += static_cast<long>(bytes);
  }
  return stats;
}

}  // namespace jax_flash_attn::runtime
