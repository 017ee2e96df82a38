// What is done with a trained model on one rank: continue a text, or write it in Hugging Face's layout.
#pragma once

#include "launch/trainer/session.h"
#include "models/convert/huggingface.h"

namespace shoal {

// Continues a text with the model in `path`: a checkpoint, a run's folder (its newest checkpoint), or a model in Hugging Face
// layout. `sample.context` is set from the model's training where that is known. INVALID_ARGUMENT: the vocabulary is
// not one of bytes.
absl::StatusOr<std::string> GenerateText(const std::string& path, SampleOptions sample, int threads);

// Writes the master weights of a checkpoint, or of a run's newest, to the folder `out`.
absl::Status ExportModel(const std::string& checkpoint, const std::string& out, DType dtype);

}  // namespace shoal
