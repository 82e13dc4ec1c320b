"""RMoE: mixture of experts with a recurrent router."""
