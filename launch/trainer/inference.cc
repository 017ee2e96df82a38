#include "launch/trainer/inference.h"

#include "launch/checkpoint/checkpoint.h"
#include "runtime/device/cpu.h"
#include "runtime/files/file.h"

namespace shoal {
namespace {

// What to run: a model's shape with the settings of its training where they are known.
struct Source {
  Config config;
  ModelConfig model;
  std::unique_ptr<CheckpointReader> checkpoint;  // Null: init_from.
  std::string init_from;
};

absl::StatusOr<Source> OpenSource(const std::string& path) {
  Source source;
  if (FileBytes(JoinPath(path, "config.json")).ok()) {
    SHOAL_ASSIGN_OR_RETURN(const ModelFolder folder, ModelFolder::Open(path));
    source.model = *folder.config();
    source.init_from = path;
    return source;
  }
  SHOAL_ASSIGN_OR_RETURN(source.checkpoint, FindCheckpoint(path));
  SHOAL_ASSIGN_OR_RETURN(source.config, CheckpointConfig(*source.checkpoint));
  source.model = ModelConfigOf(source.config);
  source.config.clear_parallel();  // One rank.
  source.config.clear_schedule();
  return source;
}

}  // namespace

absl::StatusOr<std::string> GenerateText(const std::string& path, SampleOptions sample, int threads) {
  SetThreads(threads > 0 ? threads : UsableCores());
  SHOAL_ASSIGN_OR_RETURN(const Source source, OpenSource(path));
  if (source.model.vocab_size != 256) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": its vocabulary has ", source.model.vocab_size,
                                                   " tokens; text is generated from models of bytes (256)"));
  }
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> world, ConnectWorld({}));
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<RankModel> model,
                         RankModel::Create(source.config, source.model, *world, {.training = false}));
  SHOAL_RETURN_IF_ERROR(LoadWeights({.checkpoint = source.checkpoint.get(), .init_from = source.init_from}, *model), path);
  sample.context = source.config.train().seq_length();
  return SampleText(sample, *model, *world);
}

absl::Status ExportModel(const std::string& checkpoint, const std::string& out, DType dtype) {
  SHOAL_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointReader> reader, FindCheckpoint(checkpoint));
  SHOAL_ASSIGN_OR_RETURN(const Config config, CheckpointConfig(*reader));
  ExportOptions options;
  options.dtype = dtype;
  options.max_position_embeddings = config.train().seq_length();
  const auto source = [&](const std::string& name, const Tensor& tensor) { return reader->Read(name, 0, tensor); };
  return WriteModelFolder(out, ModelConfigOf(config), source, options);
}

}  // namespace shoal
