# What every target of Shoal shares, and three short functions to declare targets with.
add_library(shoal_options INTERFACE)
target_compile_options(shoal_options INTERFACE -Wall -Wextra -Wno-missing-field-initializers -Wno-maybe-uninitialized -Werror=unused-result -Wno-unknown-pragmas -fno-math-errno)
target_include_directories(shoal_options INTERFACE ${CMAKE_SOURCE_DIR})
if(SHOAL_SANITIZE)
  target_compile_options(shoal_options INTERFACE -fsanitize=${SHOAL_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  target_link_options(shoal_options INTERFACE -fsanitize=${SHOAL_SANITIZE})
endif()
if(SHOAL_FUZZ)
  target_compile_options(shoal_options INTERFACE -fsanitize=fuzzer-no-link)
endif()
find_program(SHOAL_MOLD mold)
if(SHOAL_MOLD)
  target_link_options(shoal_options INTERFACE -fuse-ld=mold)
endif()

# shoal_library(name SRCS a.cc ... DEPS target ...): a static library.
function(shoal_library name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_library(${name} STATIC ${ARG_SRCS})
  # Who links an installed library does not compile with Shoal's options.
  target_link_libraries(${name} PUBLIC $<BUILD_INTERFACE:shoal_options> ${ARG_DEPS})
endfunction()

# shoal_proto(name PROTOS a.proto ... DEPS target ...): C++ from protobuf schemas, included by their path from the root, and
# <build>/generated/NAME.desc, the descriptor set with comments.
function(shoal_proto name)
  cmake_parse_arguments(ARG "" "" "PROTOS;DEPS" ${ARGN})
  set(out ${CMAKE_BINARY_DIR}/generated)
  set(sources)
  foreach(proto ${ARG_PROTOS})
    file(RELATIVE_PATH path ${CMAKE_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/${proto})
    string(REGEX REPLACE "\\.proto$" "" stem ${path})
    add_custom_command(
      OUTPUT ${out}/${stem}.pb.cc ${out}/${stem}.pb.h ${out}/${name}.desc
      COMMAND protobuf::protoc -I${CMAKE_SOURCE_DIR} --cpp_out=${out} --include_imports --include_source_info
              --descriptor_set_out=${out}/${name}.desc ${path}
      DEPENDS ${CMAKE_SOURCE_DIR}/${path} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR} VERBATIM)
    list(APPEND sources ${out}/${stem}.pb.cc)
  endforeach()
  file(MAKE_DIRECTORY ${out})
  add_library(${name} STATIC ${sources})
  target_include_directories(${name} SYSTEM PUBLIC ${out})
  target_link_libraries(${name} PUBLIC shoal_options protobuf::libprotobuf ${ARG_DEPS})
endfunction()

# shoal_test(name SRCS a_test.cc ... DEPS target ... [LABELS label ...] [TIMEOUT seconds] [SERIAL]): GoogleTest
# cases, each one a CTest test. SERIAL: they load both cores, or measure time-outs, and run alone.
function(shoal_test name)
  if(NOT SHOAL_TESTS)
    return()
  endif()
  cmake_parse_arguments(ARG "SERIAL" "TIMEOUT" "SRCS;DEPS;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  add_executable(${name} ${ARG_SRCS})
  if(SHOAL_SANITIZE STREQUAL "thread")
    target_sources(${name} PRIVATE ${CMAKE_SOURCE_DIR}/cmake/tsan_suppressions.cc)
  endif()
  target_compile_options(${name} PRIVATE -O1)
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} GTest::gtest GTest::gmock GTest::gtest_main)
  set(serial "")
  if(ARG_SERIAL)
    set(serial RUN_SERIAL ON)
  endif()
  gtest_discover_tests(${name} DISCOVERY_MODE PRE_TEST
    PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT} ${serial})
endfunction()
