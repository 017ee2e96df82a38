#include "models/blocks.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

namespace shoal {
namespace {

// Small enough that the owners of a bucket have nearly equal shares, large enough that a model has some thousands of blocks.
constexpr int64_t kBlockElements = 1 << 16;

int64_t RowElements(const ParameterSpec& spec) { return ElementCount(spec.shape) / spec.shape[0]; }

void Append(const ParameterSpec& spec, int parameter, int64_t row_begin, int64_t rows, Block* block) {
  block->parts.push_back({parameter, row_begin, rows, block->elements});
  block->elements += rows * RowElements(spec);
}

// The number after "experts." in a parameter's name, or -1.
int ExpertOf(const std::string& name) {
  const std::vector<std::string> words = absl::StrSplit(name, '.');
  for (size_t i = 0; i + 1 < words.size(); ++i) {
    int expert = -1;
    if (words[i] == "experts" && absl::SimpleAtoi(words[i + 1], &expert)) return expert;
  }
  return -1;
}

// "model.layers.3.self_attn.q_proj.weight" -> 3; -1 outside layers.
int LayerOf(const std::string& name) {
  const std::vector<std::string> words = absl::StrSplit(name, '.');
  int layer = -1;
  return words.size() > 2 && words[1] == "layers" && absl::SimpleAtoi(words[2], &layer) ? layer : -1;
}

void CutByRows(const ParameterSpec& spec, int parameter, int layer, std::vector<Block>* blocks) {
  const int64_t rows_each = std::max<int64_t>(1, kBlockElements / RowElements(spec));
  for (int64_t row = 0; row < spec.shape[0]; row += rows_each) {
    Block block{.name = absl::StrCat(spec.name, "/", row), .layer = layer};
    Append(spec, parameter, row, std::min(rows_each, spec.shape[0] - row), &block);
    blocks->push_back(std::move(block));
  }
}

}  // namespace

std::vector<Block> MakeBlocks(const std::vector<ParameterSpec>& parameters) {
  std::vector<Block> blocks;
  blocks.push_back({.name = "norms", .kind = BlockKind::kVectors});
  for (size_t i = 0; i < parameters.size(); ++i) {
    const ParameterSpec& spec = parameters[i];
    const int parameter = static_cast<int>(i);
    if (spec.shape.size() == 1) {
      Append(spec, parameter, 0, spec.shape[0], &blocks.front());
      continue;
    }
    const int layer = LayerOf(spec.name), expert = ExpertOf(spec.name);
    if (expert < 0) {
      CutByRows(spec, parameter, layer, &blocks);
      continue;
    }
    const std::string name = absl::StrCat("model.layers.", layer, ".expert.", expert);
    if (blocks.back().name != name) {
      blocks.push_back({.name = name, .kind = BlockKind::kExpert, .layer = layer, .expert = expert});
    }
    Append(spec, parameter, 0, spec.shape[0], &blocks.back());
  }
  return blocks;
}

}  // namespace shoal
