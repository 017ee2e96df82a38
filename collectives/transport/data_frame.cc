#include "collectives/transport/data_frame.h"

#include "runtime/base/status.h"

namespace shoal {

absl::Status ParseDataHeader(const std::byte* bytes, uint64_t epoch, DataHeader* header) {
  std::memcpy(header, bytes, sizeof *header);
  const uint64_t payload = header->bytes, total = header->total;
  if (header->magic != kDataMagic || (header->zero[0] | header->zero[1] | header->zero[2]) != 0) {
    return absl::DataLossError("sends bytes that are no frame");
  }
  if (header->epoch != epoch) {
    return absl::DataLossError(absl::StrCat("is in epoch ", header->epoch, ", this rank in ", epoch));
  }
  bool sane = false;
  switch (header->type) {
    case DataType::kEager:
      sane = payload == total && header->offset == 0 && payload <= kEagerBytesMax;
      break;
    case DataType::kSlice:
      sane = payload > 0 && payload <= kSliceBytesMax && header->offset <= total &&
             payload <= total - header->offset;
      break;
    case DataType::kAnnounce:
      sane = payload == 0 && header->offset == 0 && total <= kEagerBytesMax;
      break;
    case DataType::kReady:
    case DataType::kCredit:
    case DataType::kProbe:
      sane = payload == 0 && header->offset == 0;
      break;
  }
  if (!sane) {
    return absl::DataLossError(absl::StrCat("sends a frame that contradicts itself (type ",
                                            static_cast<int>(header->type), ", ", payload, " bytes at ",
                                            header->offset, " of ", total, ")"));
  }
  return absl::OkStatus();
}

}  // namespace shoal
