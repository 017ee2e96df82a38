// What ranks tell each other once, as plain structs, while they agree on what to build on a group in host memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "collectives/communicator.h"
#include "runtime/base/status.h"
#include "runtime/tensor/tensor.h"

namespace shoal {

// What fits of a text.
template <size_t kSize> void SetText(char (&to)[kSize], absl::string_view text) {
  const size_t size = std::min(text.size(), kSize - 1);
  std::memcpy(to, text.data(), size);
  to[size] = '\0';
}

// What each rank has said. Collective: all have come this far when it returns.
template <class Message>
absl::StatusOr<std::vector<Message>> FromAll(Communicator& host, const Message& own, absl::Time deadline, std::string_view label) {
  static_assert(std::is_trivially_copyable_v<Message>);
  constexpr int64_t kBytes = sizeof(Message);
  const Tensor in = Zeros({kBytes}, DType::kU8), out = Zeros({kBytes * host.size()}, DType::kU8);
  std::memcpy(in.raw(), &own, sizeof(own));
  std::vector<Message> all(static_cast<size_t>(host.size()));
  const std::vector<int64_t> counts(all.size(), kBytes);
  SHOAL_RETURN_IF_ERROR(host.AllGather(in, counts, out, {.deadline = deadline, .label = label}).Await());
  std::memcpy(all.data(), out.raw(), static_cast<size_t>(out.bytes()));
  return all;
}

}  // namespace shoal
