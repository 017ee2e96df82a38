#include "models/blocks.h"

#include <map>

#include "gtest/gtest.h"

namespace shoal {
namespace {

TEST(Blocks, EveryRowOfEveryParameterIsInOneBlock) {
  ModelConfig config;
  config.vocab_size = 40000;
  config.hidden_size = 96;
  config.num_attention_heads = 6;
  config.num_key_value_heads = 3;
  config.head_dim = 16;
  config.num_hidden_layers = 3;
  config.dense_layers = {false, true, false};
  const std::vector<ParameterSpec> parameters = ParameterSpecs(config);
  const std::vector<Block> blocks = MakeBlocks(parameters);
  std::map<int, int64_t> next_row;
  int64_t elements = 0;
  for (const Block& block : blocks) {
    int64_t offset = 0;
    for (const BlockPart& part : block.parts) {
      const Shape& shape = parameters[static_cast<size_t>(part.parameter)].shape;
      EXPECT_EQ(part.row_begin, next_row[part.parameter]) << block.name;
      next_row[part.parameter] += part.rows;
      EXPECT_EQ(part.offset, offset) << block.name;
      offset += part.rows * ElementCount(shape) / shape[0];
      EXPECT_EQ(block.kind == BlockKind::kVectors, shape.size() == 1) << block.name;
    }
    EXPECT_EQ(block.elements, offset);
    elements += offset;
  }
  for (size_t i = 0; i < parameters.size(); ++i) EXPECT_EQ(next_row[static_cast<int>(i)], parameters[i].shape[0]);
  EXPECT_EQ(elements, TotalParameters(config));
}

TEST(Blocks, NamesSayWhatABlockHolds) {
  ModelConfig config;
  config.num_hidden_layers = 1;
  config.num_local_experts = 2;
  std::vector<std::string> names;
  for (const Block& block : MakeBlocks(ParameterSpecs(config))) names.push_back(block.name);
  const std::string attention = "model.layers.0.self_attn.";
  EXPECT_EQ(names, (std::vector<std::string>{
                       "norms", "model.embed_tokens.weight/0", attention + "q_proj.weight/0", attention + "k_proj.weight/0",
                       attention + "v_proj.weight/0", attention + "o_proj.weight/0",
                       "model.layers.0.block_sparse_moe.gate.weight/0", "model.layers.0.expert.0", "model.layers.0.expert.1",
                       "lm_head.weight/0"}));
}

}  // namespace
}  // namespace shoal
