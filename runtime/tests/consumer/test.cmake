# Install, then build and run the consumer against the installed tree only; once by find_package, once by pkg-config.
# cmake -DBUILD=... -DSOURCE=... -DEXAMPLES=... -DBUNDLE=... -DCXX=... -DFLAGS=... -P test.cmake
set(work ${BUILD}/consumer)
file(REMOVE_RECURSE ${work})
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY COMMAND_ECHO STDOUT)
endfunction()
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${work}/prefix)
foreach(project SOURCE EXAMPLES)
  run(${CMAKE_COMMAND} -S ${${project}} -B ${work}/${project} -DCMAKE_PREFIX_PATH=${work}/prefix
      -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_CXX_FLAGS=${FLAGS})
  run(${CMAKE_COMMAND} --build ${work}/${project})
endforeach()
run(${work}/SOURCE/consumer ${BUNDLE})
file(WRITE ${work}/prompts.txt "The river\ndef f(x):\n\nHello\n")  # the empty one is refused, the others are not
run(${work}/EXAMPLES/embed_engine ${BUNDLE} INPUT_FILE ${work}/prompts.txt OUTPUT_FILE ${work}/texts.txt)
file(READ ${work}/texts.txt texts)
string(REGEX MATCHALL "\\[(stop|length)\\]" ends "${texts}")
list(LENGTH ends count)
if(NOT count EQUAL 3)
  message(FATAL_ERROR "embed_engine ended ${count} of 3 prompts: ${texts}")
endif()
run(${work}/prefix/bin/chameleon-run generate ${BUNDLE} --prompt Hello --json)

file(GLOB_RECURSE pc ${work}/prefix/*/chameleon.pc)
get_filename_component(pc_directory ${pc} DIRECTORY)
set(ENV{PKG_CONFIG_PATH} ${pc_directory})
execute_process(COMMAND pkg-config --cflags --libs chameleon
                OUTPUT_VARIABLE pkg_flags OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(pkg_flags UNIX_COMMAND "${FLAGS} ${SOURCE}/consumer.cpp ${pkg_flags} -o ${work}/by_pkg_config")
run(${CXX} ${pkg_flags})
run(${work}/by_pkg_config ${BUNDLE})
