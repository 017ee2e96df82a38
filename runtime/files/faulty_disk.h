// For tests: a disk that fails at a chosen step, once (the program lives on) or for ever (the process is
// gone). After a crash, LoseUnsynced() makes the disk look as badly as a power failure may leave it: files
// lose the bytes that were not synced, renames that were not synced are undone. Thread-safe.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "runtime/base/mutex.h"
#include "runtime/base/status.h"
#include "runtime/files/file.h"

namespace shoal {

class FaultyDisk : public DiskFaults {
 public:
  enum class Kind { kNone, kFull, kCrash };
  // The step with number `at` (from 0) and of kCrash all later ones fail. kFull concerns writes only: `at`
  // counts them.
  FaultyDisk(Kind kind, int at) : kind_(kind), at_(at) {}

  absl::Status Before(DiskAction& action) override {
    MutexLock lock(&mutex_);
    if (kind_ == Kind::kFull && action.step != DiskStep::kWrite) return Note(action);
    const int number = steps_++;
    if (kind_ == Kind::kNone || number < at_) return Note(action);
    if (kind_ == Kind::kFull && number > at_) return Note(action);
    if (kind_ == Kind::kFull || number == at_) {
      action.bytes /= 2;
    } else {
      action.bytes = 0;
    }
    if (action.step == DiskStep::kWrite) unsynced_.insert(action.path);
    failed_ = true;
    return kind_ == Kind::kFull ? absl::ResourceExhaustedError("No space left on device")
                                : absl::InternalError("the process is gone");
  }

  // Steps (of kFull: writes) so far.
  int steps() const {
    MutexLock lock(&mutex_);
    return steps_;
  }
  bool failed() const {
    MutexLock lock(&mutex_);
    return failed_;
  }

  void LoseUnsynced() {
    MutexLock lock(&mutex_);
    for (auto entry = renames_.rbegin(); entry != renames_.rend(); ++entry) {
      if (rename(entry->second.c_str(), entry->first.c_str()) == 0) Move(entry->second, entry->first);
    }
    for (const std::string& path : unsynced_) {
      if (truncate(path.c_str(), 0) != 0) continue;  // Removed since.
    }
  }

 private:
  // Keeps the books of what the disk may forget.
  absl::Status Note(const DiskAction& action) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (action.step == DiskStep::kWrite) unsynced_.insert(action.path);
    if (action.step == DiskStep::kSync) unsynced_.erase(action.path);
    if (action.step == DiskStep::kRename) {
      // Where it replaces a file, the new one stays: undoing would need the old one's bytes, and both are
      // legal.
      struct stat info;
      const bool replaces = lstat(action.new_path.c_str(), &info) == 0;
      Move(action.path, action.new_path);
      if (!replaces) renames_.emplace_back(action.path, action.new_path);
    }
    if (action.step == DiskStep::kSyncFolder) {
      std::erase_if(renames_, [&](const auto& entry) {
        return entry.second.substr(0, entry.second.find_last_of('/')) == action.path;
      });
    }
    return absl::OkStatus();
  }

  void Move(const std::string& from, const std::string& to) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto moved = [&](const std::string& path) {
      const bool inside = path == from || path.compare(0, from.size() + 1, from + "/") == 0;
      return inside ? to + path.substr(from.size()) : path;
    };
    std::set<std::string> unsynced;
    for (const std::string& path : unsynced_) unsynced.insert(moved(path));
    unsynced_ = std::move(unsynced);
    for (auto& [old_path, new_path] : renames_) {
      old_path = moved(old_path);
      new_path = moved(new_path);
    }
  }

  const Kind kind_;
  const int at_;
  mutable Mutex mutex_;
  int steps_ ABSL_GUARDED_BY(mutex_) = 0;
  bool failed_ ABSL_GUARDED_BY(mutex_) = false;
  std::set<std::string> unsynced_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::pair<std::string, std::string>> renames_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace shoal
