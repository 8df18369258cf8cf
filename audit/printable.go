package audit

import (
	"fmt"
	"strings"
)

// Printable writes a text that came from a log, a receipt or a directory, whose files
// have names too, as one line for a terminal: what is not printable ASCII becomes its code
// point, as \u{202e}, and a byte that is not UTF-8 \x{9b}. It does not tell these from the
// same characters in the text.
func Printable(text string) string {
	if strings.IndexFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) < 0 {
		return text
	}
	var b strings.Builder
	for i, r := range text {
		switch {
		case r >= ' ' && r <= '~':
			b.WriteRune(r)
		case r == 0xfffd && text[i] != 0xef:
			fmt.Fprintf(&b, `\x{%02x}`, text[i])
		default:
			fmt.Fprintf(&b, `\u{%x}`, r)
		}
	}
	return b.String()
}
