// What ThreadSanitizer takes for a race because it cannot see how libraries that were built without it count references.
extern "C" const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() { return "race:absl::debian3::Status::Unref\n"; }
