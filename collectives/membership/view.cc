#include "collectives/membership/view.h"

#include <unordered_set>

#include "collectives/membership/view_wire.h"
#include "runtime/base/status.h"

namespace shoal {
namespace {

constexpr uint64_t kMembersMax = 16384;
constexpr uint64_t kAddressesMax = 64;
constexpr size_t kNameBytesMax = 1024;

absl::Status ReadName(WireReader& in, std::string_view what, std::string* name) {
  *name = in.String();
  if (!in.ok()) return absl::DataLossError(absl::StrCat("too short for the ", AbslSv(what)));
  if (name->size() > kNameBytesMax)
    return absl::DataLossError(absl::StrCat("a ", AbslSv(what), " of ", name->size(), " bytes"));
  return absl::OkStatus();
}

}  // namespace

std::string MemberInfo::Name() const { return absl::StrCat("pid ", pid, ", host ", host_name); }

int View::RankOf(uint64_t id) const {
  for (size_t rank = 0; rank < members.size(); ++rank) {
    if (members[rank].id == id) return static_cast<int>(rank);
  }
  return -1;
}

void Write(const MemberInfo& info, WireWriter& out) {
  out.U64(info.id).U64(info.pid).String(info.host_name).String(info.boot).String(info.unix_name);
  out.U64(info.addresses.size());
  for (const std::string& address : info.addresses) out.String(address);
  out.U64(info.wanted_rank + 1);
}

absl::Status Read(WireReader& in, MemberInfo* info) {
  info->id = in.U64();
  info->pid = static_cast<int64_t>(in.U64());
  SHOAL_RETURN_IF_ERROR(ReadName(in, "host name", &info->host_name));
  SHOAL_RETURN_IF_ERROR(ReadName(in, "boot id", &info->boot));
  SHOAL_RETURN_IF_ERROR(ReadName(in, "socket name", &info->unix_name));
  const uint64_t addresses = in.U64();
  if (addresses > kAddressesMax) return absl::DataLossError(absl::StrCat(addresses, " addresses"));
  info->addresses.resize(addresses);
  for (std::string& address : info->addresses) SHOAL_RETURN_IF_ERROR(ReadName(in, "address", &address));
  const uint64_t wanted_rank = in.U64();
  if (!in.ok()) return absl::DataLossError("too short for a member");
  if (info->id == 0) return absl::DataLossError("a member without id");
  if (wanted_rank > kMembersMax) return absl::DataLossError(absl::StrCat("wanted rank ", wanted_rank - 1));
  info->wanted_rank = static_cast<int>(wanted_rank) - 1;
  return absl::OkStatus();
}

void Write(const View& view, WireWriter& out) {
  out.U64(view.lineage).U64(static_cast<uint64_t>(view.epoch)).U64(view.members.size());
  for (const MemberInfo& member : view.members) Write(member, out);
}

absl::Status Read(WireReader& in, View* view) {
  view->lineage = in.U64();
  view->epoch = Epoch{in.U64()};
  const uint64_t members = in.U64();
  if (!in.ok()) return absl::DataLossError("too short for a view");
  if (members > kMembersMax) return absl::DataLossError(absl::StrCat("a view of ", members, " members"));
  if ((view->lineage == 0) != (members == 0) || (view->epoch == Epoch{0}) != (members == 0))
    return absl::DataLossError("a view that is neither empty nor whole");
  std::unordered_set<uint64_t> ids;
  view->members.clear();
  for (uint64_t rank = 0; rank < members; ++rank) {
    MemberInfo& member = view->members.emplace_back();
    SHOAL_RETURN_IF_ERROR(Read(in, &member), "rank ", rank);
    if (!ids.insert(member.id).second)
      return absl::DataLossError(absl::StrCat("rank ", rank, " is in the view twice"));
  }
  return absl::OkStatus();
}

std::string Encode(const View& view) {
  WireWriter out;
  Write(view, out);
  return out.Take();
}

absl::StatusOr<View> DecodeView(std::string_view bytes) {
  WireReader in(bytes);
  View view;
  SHOAL_RETURN_IF_ERROR(Read(in, &view), "a view");
  if (!in.AtEnd()) return absl::DataLossError("a view with more bytes after it");
  return view;
}

}  // namespace shoal
