// What ThreadSanitizer takes for a race because it cannot see the atomics of libraries that were built without it: Abseil's counts of
// references, Protocol Buffers' defaults of strings, which are made when first read.
extern "C" const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() {
  return "race:absl::debian3::Status::Unref\n"
         "race:google::protobuf::internal::LazyString::Init\n";
}
