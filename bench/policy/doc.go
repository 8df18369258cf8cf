// Package policy measures Decide beside Cedar on the same questions. It is a module
// of its own, so that Cedar stays out of the product's.
//
//	cd bench/policy && go test -bench . -benchmem
package policy
