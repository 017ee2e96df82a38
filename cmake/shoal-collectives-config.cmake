# find_package(shoal-collectives): target shoal::collectives, for C (collectives/c_api.h) and C++ (collectives/communicator.h).
include(CMakeFindDependencyMacro)
find_dependency(Threads)
find_dependency(OpenMP COMPONENTS CXX)
find_dependency(absl)
find_dependency(OpenSSL COMPONENTS Crypto)
find_dependency(nlohmann_json)
include(${CMAKE_CURRENT_LIST_DIR}/shoal-collectives-targets.cmake)
