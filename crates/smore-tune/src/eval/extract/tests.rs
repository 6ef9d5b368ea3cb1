//! Fifty outputs, each with what a person reads out of it by the rules.

use super::*;

/// Output, strict match, flexible match.
const OUTPUTS: [(&str, Option<&str>, Option<&str>); 50] = [
    ("She makes 9 * 2 = $18 every day.\n#### 18", Some("18"), Some("18")),
    ("#### 18", Some("18"), Some("18")),
    ("#### -7", Some("-7"), Some("-7")),
    ("#### 1,234", Some("1234"), Some("1234")),
    ("#### 12.5", Some("12.5"), Some("12.5")),
    ("#### 42.", Some("42"), Some("42")),
    ("#### $42", None, Some("42")),
    ("####42", None, Some("42")),
    ("###  42", None, Some("42")),
    ("#### 42 apples", Some("42"), Some("42")),
    ("#### 42\n\nThat took 3 steps", Some("42"), Some("3")),
    ("#### 3\n#### 4", Some("3"), Some("4")),
    ("#### 1,000,000", Some("1000000"), Some("1000000")),
    ("#### 0", Some("0"), Some("0")),
    ("#### 007", Some("007"), Some("007")),
    ("##### 5", Some("5"), Some("5")),
    ("#### five", None, None),
    ("####  8", None, Some("8")),
    ("The answer is 5", None, Some("5")),
    ("The answer is 5.", None, Some("5")),
    ("The answer is $5.", None, Some("5")),
    ("The answer is $5.50.", None, Some("5.50")),
    ("The answer is -5", None, Some("-5")),
    ("It costs $1,250, all told", None, Some("1250")),
    ("It costs 1,250.75 dollars", None, Some("1250.75")),
    ("First 10, then 20, at last 30", None, Some("30")),
    ("10 + 20 = 30", None, Some("30")),
    ("5*4=20", None, Some("20")),
    ("<<5*4=20>>20 cookies", None, Some("20")),
    ("<<5*4=20>>", None, Some("20")),
    ("x = 3/4", None, Some("4")),
    ("50%", None, Some("50")),
    ("50% of 80 is 40%", None, Some("40")),
    ("7 apples...", None, Some("7")),
    ("7, 8, ...", None, Some("8")),
    ("$$$", None, None),
    ("...", None, None),
    ("I do not know", None, None),
    ("", None, None),
    ("\n\n\n", None, None),
    ("twelve", None, None),
    ("3 dogs and 4 cats", None, Some("4")),
    ("Answer: **72**", None, Some("72")),
    ("\\boxed{72}", None, Some("72")),
    ("\\boxed{1{,}000}", None, Some("000")),
    ("It is 8:30", None, Some("30")),
    ("Step 1. He has 6.\nStep 2.", None, Some("2")),
    ("between 3-4 hours", None, Some("-4")),
    ("So he needs 15 days. \u{1f389}", None, Some("15")),
    ("\u{7b54}\u{6848}\u{662f}36\u{3002}", None, Some("36")),
];

#[test]
fn numbers_are_read_out_of_fifty_outputs() {
    for (text, want_strict, want_flexible) in OUTPUTS {
        assert_eq!(strict(text).as_deref(), want_strict, "strict: {text:?}");
        assert_eq!(flexible(text).as_deref(), want_flexible, "flexible: {text:?}");
    }
}

#[test]
fn letters_are_found_and_articles_are_not() {
    let cases = [
        ("A", Some(0)),
        (" (B)", Some(1)),
        ("C.", Some(2)),
        ("**D** because", Some(3)),
        ("B) the dog", Some(1)),
        ("A dog barks", None),
        ("Apples", None),
        ("The answer is (C).", Some(2)),
        ("the correct answer is B", Some(1)),
        ("Answer: D", Some(3)),
        ("It cannot be told", None),
        ("I think (B) fits best", Some(1)),
        ("Neither (A) nor (B)", None),
        ("E", None),
        ("", None),
        ("The answer is A, no, the answer is B", Some(1)),
    ];
    for (text, want) in cases {
        assert_eq!(letter(text, 4), want, "{text:?}");
    }
}
