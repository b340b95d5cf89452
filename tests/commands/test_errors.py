from lit_distill.commands.errors import one_line

UNION = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'Module'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'a.B':
        Parser key "width":
          {reason}
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {{'class_path': 'a.B', 'init_args': {{'width': 'x'}}}}"""


def test_a_plain_sentence_stays_as_it_is() -> None:
    assert one_line(ValueError("Expected a path: give --out.")) == "Expected a path: give --out."


def test_an_error_without_words_has_its_name() -> None:
    assert one_line(ZeroDivisionError()) == "ZeroDivisionError"


def test_of_a_union_what_the_class_says_is_kept() -> None:
    error = ValueError(UNION.format(reason="width must be even. Got value: Namespace(a=1, b=2)"))
    assert one_line(error) == (
        "Parser key \"model\": Problem with given class_path 'a.B': "
        'Parser key "width": width must be even'
    )


def test_where_only_types_mismatch_they_are_named() -> None:
    mismatch = """Parser key "a":
  Does not validate against any of the Union subtypes
  Errors:
    - Expected a <class 'str'>
    - Expected a <class 'NoneType'>
  Given value: 3"""
    assert one_line(ValueError(mismatch)) == (
        "Parser key \"a\": Expected a <class 'str'> Expected a <class 'NoneType'>"
    )
