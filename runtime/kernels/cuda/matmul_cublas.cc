#include "runtime/kernels/cuda/matmul_cublas.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

#include "runtime/device/cuda/runtime.h"
#include "runtime/kernels/cuda/column_product.h"

namespace shoal::cuda {
namespace {

using Code = DeviceResult::Code;

constexpr size_t kWorkspaceBytes = size_t{32} << 20;
// Shapes whose choice is kept: a step has some dozens. When there are more, all are chosen anew.
constexpr size_t kPlansMax = 4096;

struct Library {
  std::string missing;  // Why there is none.
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtGetStatusString) status_string = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulDescCreate) create_product = nullptr;
  decltype(&cublasLtMatmulDescDestroy) destroy_product = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_product = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) create_layout = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) destroy_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) create_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
};

template <class Function> void Find(void* handle, const char* name, Library* library, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  if (*function == nullptr) library->missing = std::string("cuBLASLt has no ") + name;
}

// The functions used here are the same in releases 12 and 13.
Library Load() {
  Library library;
  std::string why;
  void* handle = OpenLibrary("libcublasLt.so.13", &why);
  if (handle == nullptr) {
    std::string older;
    handle = OpenLibrary("libcublasLt.so.12", &older);
  }
  if (handle == nullptr) {
    library.missing = why;
    return library;
  }
  Find(handle, "cublasLtCreate", &library, &library.create);
  Find(handle, "cublasLtGetStatusString", &library, &library.status_string);
  Find(handle, "cublasLtMatmul", &library, &library.matmul);
  Find(handle, "cublasLtMatmulAlgoGetHeuristic", &library, &library.heuristic);
  Find(handle, "cublasLtMatmulDescCreate", &library, &library.create_product);
  Find(handle, "cublasLtMatmulDescDestroy", &library, &library.destroy_product);
  Find(handle, "cublasLtMatmulDescSetAttribute", &library, &library.set_product);
  Find(handle, "cublasLtMatrixLayoutCreate", &library, &library.create_layout);
  Find(handle, "cublasLtMatrixLayoutDestroy", &library, &library.destroy_layout);
  Find(handle, "cublasLtMatmulPreferenceCreate", &library, &library.create_preference);
  Find(handle, "cublasLtMatmulPreferenceDestroy", &library, &library.destroy_preference);
  Find(handle, "cublasLtMatmulPreferenceSetAttribute", &library, &library.set_preference);
  return library;
}

const Library& Lt() {
  static const Library* const library = new Library(Load());
  return *library;
}

DeviceResult Check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return {};
  const Code code = status == CUBLAS_STATUS_ALLOC_FAILED ? Code::kOutOfMemory : Code::kFailed;
  return Say(code, std::string("cuBLASLt: ") + what + ": " + Lt().status_string(status));
}

// How a pointer is aligned, up to what cuBLASLt asks about.
uint32_t Alignment(const void* pointer) {
  uint32_t alignment = 256;
  while (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) alignment /= 2;
  return alignment;
}

// What a choice of algorithm depends on.
struct Key {
  int device;
  int64_t m, n, k;
  bool transpose_first, transpose_second;
  DType in, out;
  uint32_t first_alignment, second_alignment, result_alignment;

  auto Tie() const {
    return std::tie(device, m, n, k, transpose_first, transpose_second, in, out, first_alignment, second_alignment, result_alignment);
  }
  friend bool operator<(const Key& a, const Key& b) { return a.Tie() < b.Tie(); }
};

// Descriptors and an algorithm. Used by several threads at once, which only read it.
struct Plan {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t first = nullptr, second = nullptr, result = nullptr;
  cublasLtMatmulAlgo_t algorithm = {};

  Plan() = default;
  Plan(const Plan&) = delete;
  ~Plan() {
    if (product != nullptr) Lt().destroy_product(product);
    for (cublasLtMatrixLayout_t layout : {first, second, result}) {
      if (layout != nullptr) Lt().destroy_layout(layout);
    }
  }
};

cudaDataType_t TypeOf(DType dtype) { return dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F; }

cublasComputeType_t ComputeType(DType in) {
  static const char* const tf32 = std::getenv("SHOAL_CUDA_TF32");
  const bool fast = in == DType::kF32 && tf32 != nullptr && std::string(tf32) == "1";
  return fast ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
}

#define SHOAL_LT_RETURN_IF_ERROR(call, what) \
  if (const DeviceResult result_ = Check(call, what); result_.code != Code::kOk) return result_

DeviceResult Describe(const Key& key, const ColumnProduct& product, Plan* plan) {
  const Library& lt = Lt();
  SHOAL_LT_RETURN_IF_ERROR(lt.create_product(&plan->product, ComputeType(key.in), CUDA_R_32F), "describing a product");
  const auto transpose = [](bool wanted) -> cublasOperation_t { return wanted ? CUBLAS_OP_T : CUBLAS_OP_N; };
  const cublasOperation_t first = transpose(product.transpose_first), second = transpose(product.transpose_second);
  SHOAL_LT_RETURN_IF_ERROR(lt.set_product(plan->product, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof(first)), "describing a product");
  SHOAL_LT_RETURN_IF_ERROR(lt.set_product(plan->product, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof(second)), "describing a product");
  const auto layout = [&](const ColumnMatrix& matrix, DType dtype, cublasLtMatrixLayout_t* to) {
    return lt.create_layout(to, TypeOf(dtype), static_cast<uint64_t>(matrix.rows), static_cast<uint64_t>(matrix.columns),
                            matrix.leading);
  };
  SHOAL_LT_RETURN_IF_ERROR(layout(product.first, key.in, &plan->first), "describing a matrix");
  SHOAL_LT_RETURN_IF_ERROR(layout(product.second, key.in, &plan->second), "describing a matrix");
  SHOAL_LT_RETURN_IF_ERROR(layout(product.result, key.out, &plan->result), "describing a matrix");
  return {};
}

DeviceResult Choose(cublasLtHandle_t handle, const Key& key, Plan* plan) {
  const Library& lt = Lt();
  cublasLtMatmulPreference_t preference = nullptr;
  SHOAL_LT_RETURN_IF_ERROR(lt.create_preference(&preference), "choosing an algorithm");
  const std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>, decltype(lt.destroy_preference)> owner(
      preference, lt.destroy_preference);
  const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;  // Of parts of a sum, apart from none.
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    return lt.set_preference(preference, attribute, &value, sizeof(value));
  };
  SHOAL_LT_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes), "choosing an algorithm");
  SHOAL_LT_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions), "choosing an algorithm");
  SHOAL_LT_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.first_alignment), "choosing an algorithm");
  SHOAL_LT_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.second_alignment), "choosing an algorithm");
  SHOAL_LT_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.result_alignment), "choosing an algorithm");
  SHOAL_LT_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.result_alignment), "choosing an algorithm");
  cublasLtMatmulHeuristicResult_t best = {};
  int found = 0;
  SHOAL_LT_RETURN_IF_ERROR(lt.heuristic(handle, plan->product, plan->first, plan->second, plan->result, plan->result, preference, 1,
                                        &best, &found),
                           "choosing an algorithm");
  if (found == 0) return Say(Code::kFailed, "cuBLASLt knows no algorithm for this product");
  plan->algorithm = best.algo;
  return {};
}

// Handles by device, plans by shape. Never ends.
class Context {
 public:
  static Context& Get() {
    static Context* const context = new Context;
    return *context;
  }

  DeviceResult Prepare(const Key& key, const ColumnProduct& product, cublasLtHandle_t* handle, std::shared_ptr<const Plan>* plan) {
    const std::lock_guard lock(mutex_);
    cublasLtHandle_t& own = handles_[key.device];
    if (own == nullptr) SHOAL_LT_RETURN_IF_ERROR(Lt().create(&own), "starting");
    *handle = own;
    const auto known = plans_.find(key);
    if (known != plans_.end()) {
      *plan = known->second;
      return {};
    }
    const auto made = std::make_shared<Plan>();
    if (const DeviceResult result = Describe(key, product, made.get()); result.code != Code::kOk) return result;
    if (const DeviceResult result = Choose(own, key, made.get()); result.code != Code::kOk) return result;
    if (plans_.size() >= kPlansMax) plans_.clear();
    plans_[key] = made;
    *plan = made;
    return {};
  }

 private:
  std::mutex mutex_;
  std::map<int, cublasLtHandle_t> handles_;
  std::map<Key, std::shared_ptr<const Plan>> plans_;
};

}  // namespace

DeviceResult MatMulReady() {
  if (Lt().missing.empty()) return {};
  return {Code::kUnavailable, Lt().missing.c_str()};
}

DeviceResult MatMul(const DeviceTensor& a, bool transpose_a, const DeviceTensor& b, bool transpose_b, const DeviceTensor& addend,
                    const DeviceTensor& c, DeviceStream* stream) {
  if (const DeviceResult ready = MatMulReady(); ready.code != Code::kOk) return ready;
  const ColumnProduct product = ByColumns(a, transpose_a, b, transpose_b, c);
  if (product.m == 0 || product.n == 0) return {};
  const bool add = addend.elements > 0;
  if (product.k == 0) {
    const auto bytes = static_cast<size_t>(c.elements * SizeOf(c.dtype));
    if (!add) return Failed(cudaMemsetAsync(c.data, 0, bytes, Native(stream)));
    if (addend.data == c.data) return {};
    return Failed(cudaMemcpyAsync(c.data, addend.data, bytes, cudaMemcpyDeviceToDevice, Native(stream)));
  }
  const Key key = {.device = Device(),
                   .m = product.m,
                   .n = product.n,
                   .k = product.k,
                   .transpose_first = product.transpose_first,
                   .transpose_second = product.transpose_second,
                   .in = a.dtype,
                   .out = c.dtype,
                   .first_alignment = Alignment(b.data),
                   .second_alignment = Alignment(a.data),
                   .result_alignment = std::min(Alignment(c.data), Alignment(add ? addend.data : c.data))};
  cublasLtHandle_t handle = nullptr;
  void* workspace = nullptr;
  std::shared_ptr<const Plan> plan;
  if (const DeviceResult prepared = Context::Get().Prepare(key, product, &handle, &plan); prepared.code != Code::kOk) return prepared;
  if (const DeviceResult got = Scratch(stream, kWorkspaceBytes, &workspace); got.code != Code::kOk) return got;
  const float one = 1, old = add ? 1 : 0;
  return Check(Lt().matmul(handle, plan->product, &one, b.data, plan->first, a.data, plan->second, &old, add ? addend.data : c.data,
                           plan->result, c.data, plan->result, &plan->algorithm, workspace, kWorkspaceBytes, Native(stream)),
               "multiplying");
}

}  // namespace shoal::cuda
