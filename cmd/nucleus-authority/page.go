package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"cal/approval"
	"cal/approval/client"
)

func (c *command) page() *cobra.Command {
	cmd := &cobra.Command{
		Use: "page [ID]", Short: "Print the link of the page at which a passkey approves", Args: args(cobra.MaximumNArgs(1)),
		Long: "Print the link of the page at which a passkey approves, at an ask or at the list. Who has the link sees all asks and can deny\n" +
			"them; to approve takes the passkey. It is good until the authority is started anew. Open it by hand: in the arguments of a\n" +
			"program other users of this host could read it.",
		Example: "  nucleus-authority page\n  nucleus-authority page a-JX2Q",
	}
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		api := client.New(c.socket)
		defer api.Close()
		page, err := api.Page(cmd.Context(), append(ids, "")[0])
		if err != nil {
			return err
		}
		fmt.Println(approval.Visible(page.Link))
		return nil
	}
	return cmd
}
