#include <dlfcn.h>
#include <glob.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "runtime/device/cuda/runtime.h"

namespace shoal::cuda {
namespace {

void AddFolders(const std::string& list, std::vector<std::string>* folders) {
  size_t begin = 0;
  while (begin < list.size()) {
    const size_t end = std::min(list.find(':', begin), list.size());
    if (end > begin) folders->push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
}

void AddMatches(const std::string& pattern, std::vector<std::string>* folders) {
  glob_t found = {};
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0) {
    for (size_t i = 0; i < found.gl_pathc; ++i) folders->push_back(found.gl_pathv[i]);
  }
  globfree(&found);
}

// Outside of the loader's list, the likeliest first.
std::vector<std::string> UsualFolders() {
  std::vector<std::string> folders;
  if (const char* home = std::getenv("CUDA_HOME")) folders.push_back(std::string(home) + "/lib64");
  folders.push_back("/usr/local/cuda/lib64");
  std::vector<std::string> prefixes;
  for (const char* name : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    if (const char* prefix = std::getenv(name)) prefixes.push_back(prefix);
  }
  // Those of the Pythons that a shell would find, which may be environments that nobody has activated.
  std::vector<std::string> programs;
  if (const char* path = std::getenv("PATH")) AddFolders(path, &programs);
  for (const std::string& program : programs) {
    if (access((program + "/python3").c_str(), X_OK) == 0) prefixes.push_back(program + "/..");
  }
  if (const char* home = std::getenv("HOME")) prefixes.push_back(std::string(home) + "/.local");
  for (const char* prefix : {"/usr/local", "/usr", "/opt/*"}) prefixes.push_back(prefix);
  for (const std::string& prefix : prefixes) {
    for (const char* packages : {"dist-packages", "site-packages"}) {
      AddMatches(prefix + "/lib/python3*/" + packages + "/nvidia/*/lib", &folders);
    }
  }
  return folders;
}

// Others find it by its soname afterwards (RTLD_GLOBAL).
void* Open(const std::string& path) { return dlopen(path.c_str(), RTLD_LAZY | RTLD_GLOBAL); }

}  // namespace

void* OpenLibrary(const char* soname, std::string* why) {
  std::vector<std::string> named;
  if (const char* list = std::getenv("SHOAL_CUDA_LIBRARIES")) AddFolders(list, &named);
  for (const std::string& folder : named) {
    if (void* library = Open(folder + "/" + soname)) return library;
  }
  if (void* library = Open(soname)) return library;
  *why = dlerror();
  for (const std::string& folder : UsualFolders()) {
    if (void* library = Open(folder + "/" + soname)) return library;
  }
  *why += "; not in the toolkit or Python's packages either; SHOAL_CUDA_LIBRARIES can list its folder";
  return nullptr;
}

}  // namespace shoal::cuda
